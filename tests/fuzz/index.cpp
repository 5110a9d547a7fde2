// Indexes of layers: the bytes, and the bytes with right checksums.
#include <algorithm>
#include <vector>

#include "base/little_endian.h"
#include "image/index_format.h"
#include "target.h"

namespace unmoor {
namespace {

void Decode(std::span<const std::byte> bytes) {
  const auto header = index_format::DecodeHeader(bytes.first(index_format::kHeaderSize), "fuzzed");
  if (!header || bytes.size() - index_format::kHeaderSize < header->table_bytes()) return;
  const auto table = bytes.subspan(index_format::kHeaderSize, header->table_bytes());
  const auto tables = index_format::DecodeTables(*header, table, "fuzzed");
  if (!tables) return;
  // What was read is what would be written.
  const auto again = index_format::EncodeTables(tables->extents, tables->segments);
  UNMOOR_CHECK(std::ranges::equal(again, table));
}

}  // namespace
}  // namespace unmoor

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace unmoor;
  const auto raw = std::as_bytes(std::span(data, size));
  std::vector<std::byte> bytes(raw.begin(), raw.end());
  if (bytes.size() < index_format::kHeaderSize) return 0;
  Decode(bytes);
  // The header's checksum, then that of the tables it tells of.
  const auto seal = [&] {
    PutLittleEndian(bytes, 120, index_format::Checksum(std::span(bytes).first(120)));
  };
  seal();
  const auto header = index_format::DecodeHeader(
      std::span<const std::byte>(bytes).first(index_format::kHeaderSize), "fuzzed");
  if (!header || bytes.size() - index_format::kHeaderSize < header->table_bytes()) return 0;
  PutLittleEndian(bytes, 88,
                  index_format::Checksum(std::span<const std::byte>(bytes).subspan(
                      index_format::kHeaderSize, header->table_bytes())));
  seal();
  Decode(bytes);
  return 0;
}
