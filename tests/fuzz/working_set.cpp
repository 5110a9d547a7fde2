// Working sets: the bytes, and the bytes with a right checksum.
#include <algorithm>
#include <vector>

#include "base/little_endian.h"
#include "image/index_format.h"
#include "image/working_set.h"
#include "target.h"

namespace unmoor {
namespace {

void Decode(std::span<const std::byte> bytes) {
  const auto set = DecodeWorkingSet(bytes, "fuzzed");
  if (!set) return;
  // What was read is what would be written.
  UNMOOR_CHECK(std::ranges::equal(EncodeWorkingSet(*set), bytes));
  Manifest manifest;
  for (const std::string& id : set->layers) {
    manifest.layers.push_back({id, Bytes(uint64_t{1} << 30), Bytes(0), Bytes(0), 0});
  }
  (void)CheckWorkingSet(*set, manifest, "fuzzed");
}

}  // namespace
}  // namespace unmoor

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace unmoor;
  constexpr size_t kChecksum = 8;
  const auto raw = std::as_bytes(std::span(data, size));
  Decode(raw);
  if (raw.size() < kChecksum) return 0;
  std::vector<std::byte> bytes(raw.begin(), raw.end());
  const auto covered = std::span<const std::byte>(bytes).first(bytes.size() - kChecksum);
  PutLittleEndian(bytes, covered.size(), index_format::Checksum(covered));
  Decode(bytes);
  return 0;
}
