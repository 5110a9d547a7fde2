// Manifests: the bytes, and the bytes with a right checksum, so that what is behind it is reached.
#include "image/manifest.h"

#include <xxhash.h>

#include <cstdlib>

#include "target.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace unmoor;
  // SAFETY: char may alias any object.
  std::string text(reinterpret_cast<const char*>(data), size);
  (void)ParseManifest(text, "fuzzed");
  constexpr size_t kEnding = 51;
  if (text.size() > kEnding) text.resize(text.size() - kEnding);
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits(text.data(), text.size()));
  text += "  \"checksum\": \"";
  for (const unsigned char byte : canonical.digest) text += fmt::format("{:02x}", byte);
  text += "\"\n}\n";
  const auto manifest = ParseManifest(text, "fuzzed");
  // What was read can be written.
  if (manifest && !EncodeManifest(*manifest)) std::abort();
  return 0;
}
