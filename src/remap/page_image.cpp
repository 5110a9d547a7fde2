// See page_image.h.
#include "remap/page_image.h"

#include <algorithm>
#include <cctype>

#include "image/layout.h"

namespace unmoor {
namespace {

bool IsOurLayer(std::string_view directory, std::string_view file) {
  return directory.ends_with("/layers") && file.ends_with(kPagesSuffix);
}

bool IsCriuPages(std::string_view file) {
  if (!file.starts_with("pages-") || !file.ends_with(".img")) return false;
  file.remove_prefix(6);
  file.remove_suffix(4);
  return !file.empty() &&
         std::ranges::all_of(file, [](unsigned char c) { return std::isdigit(c); });
}

}  // namespace

bool MapsPageImage(const VmaInfo& vma) {
  if (vma.shared || vma.inode == 0) return false;
  std::string_view path = vma.name;
  constexpr std::string_view kDeleted = " (deleted)";
  if (path.ends_with(kDeleted)) path.remove_suffix(kDeleted.size());
  const size_t slash = path.rfind('/');
  if (slash == std::string_view::npos) return false;
  return IsOurLayer(path.substr(0, slash), path.substr(slash + 1)) ||
         IsCriuPages(path.substr(slash + 1));
}

}  // namespace unmoor
