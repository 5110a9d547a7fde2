// The names of anonymous memory (PR_SET_VMA_ANON_NAME). A file mapping has none, so while a VMA is
// mapped from a page image its name is only in the manifest beside that image; the mirror that
// takes its place gets it back.
//
// Only a name: whatever cannot be read (the directory was deleted, another tool made it) names
// nothing and is no error.
#pragma once

#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "image/manifest.h"
#include "os/procfs.h"

namespace unmoor {

class VmaNames {
 public:
  struct Named {
    FileRange range;   // of the layer
    std::string name;  // without "[anon:" and "]"
    bool operator==(const Named&) const = default;
  };
  // Of the memory that a layer of this checkpoint is the base of.
  [[nodiscard]] static std::vector<Named> In(const Manifest& manifest, std::string_view layer_id);

  // Looks at the manifests beside those images it does not know yet.
  void Learn(std::span<const VmaInfo> images);
  // Of the memory that `image` (as maps has it) shows at `offset`; empty: it had no name.
  [[nodiscard]] std::string At(const std::string& image, FileOffset offset) const;

 private:
  std::map<std::string, std::vector<Named>> images_;
};

}  // namespace unmoor
