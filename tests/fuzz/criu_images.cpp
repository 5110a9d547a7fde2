// CRIU's images as an image directory brings them: the process tree, memory maps and pagemaps, read
// by what restore, verify and export read them with.
#include <cstdlib>
#include <string>

#include "criu/image_codec.h"
#include "criu/metadata.h"
#include "criu/page_images.h"
#include "os/file.h"
#include "target.h"

namespace unmoor {
namespace {

// One file of a directory is the input, in turn each that is read.
class Folder {
 public:
  Folder() {
    const char* const parent = std::getenv("TMPDIR");
    path_ = MakeTemporaryDirectory(parent != nullptr ? parent : "/tmp", "unmoor-fuzz-").value();
  }
  ~Folder() { (void)RemoveTree(path_); }
  [[nodiscard]] const std::string& Put(const std::string& name, std::string_view bytes) const {
    UNMOOR_CHECK(WriteFile(path_ + "/" + name, bytes).has_value());
    return path_;
  }

 private:
  std::string path_;
};

}  // namespace
}  // namespace unmoor

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace unmoor;
  static const Folder folder;
  // SAFETY: char may alias any object.
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  for (const auto type :
       {criu::ImageType::kInventory, criu::ImageType::kPstree, criu::ImageType::kCore,
        criu::ImageType::kMm, criu::ImageType::kFiles, criu::ImageType::kPagemap}) {
    (void)criu::RawImage::Parse(std::string(bytes), type, "fuzzed");
  }
  (void)criu::ReadTasks(folder.Put("pstree.img", bytes));
  (void)criu::ReadVmas(folder.Put("mm-1.img", bytes), 1);
  (void)criu::ReadPagemap(folder.Put("pagemap-1.img", bytes), {criu::StreamKind::kTask, 1});
  return 0;
}
