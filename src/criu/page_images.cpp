// See page_images.h.
#include "criu/page_images.h"

#include <fcntl.h>

#include <algorithm>
#include <charconv>

#include "criu/image_codec.h"
#include "os/file.h"
#include "proto/image.pb.h"

namespace unmoor::criu {
namespace {

// 57 address bits, as with five-level page tables.
constexpr uint64_t kMaxAddress = uint64_t{1} << 57;

}  // namespace

std::string PagemapName(PageStreamId id) {
  return id.kind == StreamKind::kTask ? fmt::format("pagemap-{}.img", id.id)
                                      : fmt::format("pagemap-shmem-{}.img", id.id);
}

std::optional<PageStreamId> ParsePagemapName(std::string_view name) {
  constexpr std::string_view kTask = "pagemap-", kSharedMemory = "pagemap-shmem-";
  if (!name.starts_with(kTask)) return std::nullopt;
  PageStreamId id;
  if (name.starts_with(kSharedMemory)) id.kind = StreamKind::kSharedMemory;
  name.remove_prefix(name.starts_with(kSharedMemory) ? kSharedMemory.size() : kTask.size());
  const char* const end = name.data() + name.size();
  const auto parsed = std::from_chars(name.data(), end, id.id);
  if (parsed.ec != std::errc() || std::string_view(parsed.ptr, end) != ".img") return std::nullopt;
  return id;
}

std::string PagesName(uint32_t pages_id) {
  return fmt::format("pages-{}.img", pages_id);
}

Result<> PageImageWriter::Open(PageStreamId id) {
  if (streams_.contains(id)) return {};
  Stream stream;
  stream.pages_id = next_pages_id_;
  stream.pages_path = directory_ + "/" + PagesName(stream.pages_id);
  UNMOOR_ASSIGN(stream.pages,
                OpenFile(stream.pages_path, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW, 0600));
  ++next_pages_id_;
  streams_.emplace(id, std::move(stream));
  return {};
}

Result<PageImageWriter::Stream*> PageImageWriter::Find(PageStreamId id) {
  const auto found = streams_.find(id);
  if (found == streams_.end()) {
    return MachineError("{}: pages came for {} before it was opened", directory_, ToString(id));
  }
  return &found->second;
}

Result<> PageImageWriter::Add(Stream& stream, PageStreamId id, uint64_t begin, uint64_t pages,
                              uint32_t flags) {
  UNMOOR_CHECK(begin % kPageSize == 0);
  if (!stream.entries.empty()) {
    Entry& last = stream.entries.back();
    const uint64_t end = last.begin + last.pages * kPageSize;
    if (begin < end) {
      return MachineError("{}: pages at {:#x} of {} came after those up to {:#x}", directory_,
                          begin, ToString(id), end);
    }
    if (begin == end && flags == last.flags) {
      last.pages += pages;
      return {};
    }
  }
  stream.entries.push_back({begin, pages, flags});
  return {};
}

Result<> PageImageWriter::Pages(PageStreamId id, Vaddr at, uint32_t flags,
                                std::span<const std::byte> data) {
  UNMOOR_CHECK(!data.empty() && data.size() % kPageSize == 0);
  UNMOOR_ASSIGN(Stream* const stream, Find(id));
  UNMOOR_TRY(Add(*stream, id, at.value, data.size() / kPageSize, flags | kPagePresent));
  UNMOOR_TRY(
      WriteExactlyAt(stream->pages.get(), data, FileOffset(stream->size), stream->pages_path));
  stream->size += data.size();
  written_ += Bytes(data.size());
  return {};
}

Result<> PageImageWriter::Absent(PageStreamId id, VaddrRange range, uint32_t flags) {
  UNMOOR_ASSIGN(Stream* const stream, Find(id));
  return Add(*stream, id, range.begin.value, range.size().value / kPageSize, flags);
}

bool PageImageWriter::HasEntries(PageStreamId id) const {
  const auto found = streams_.find(id);
  return found != streams_.end() && !found->second.entries.empty();
}

Result<> PageImageWriter::Finish(bool sync) {
  for (const auto& [id, stream] : streams_) {
    if (id.kind == StreamKind::kTask && stream.entries.empty()) {
      return MachineError("{}: {} is left without any page, which criu does not restore",
                          directory_, ToString(id));
    }
    std::vector<PagemapEntry> entries;
    for (const Entry& entry : stream.entries) {
      const Vaddr begin(entry.begin);
      entries.push_back({{begin, begin + Bytes(entry.pages * kPageSize)}, entry.flags, {}});
    }
    const std::string path = directory_ + "/" + PagemapName(id);
    UNMOOR_TRY(WriteFile(path, EncodePagemap(stream.pages_id, entries), 0600));
    if (sync) {
      UNMOOR_TRY(SyncPath(path));
      UNMOOR_TRY(SyncFd(stream.pages.get(), stream.pages_path));
    }
  }
  return {};
}

std::string EncodePagemap(uint32_t pages_id, std::span<const PagemapEntry> entries) {
  ImageBuilder builder(ImageType::kPagemap);
  proto::PagemapHead head;
  head.set_pages_id(pages_id);
  builder.Append(head.SerializeAsString());
  for (size_t i = 0; i < entries.size();) {
    VaddrRange range = entries[i].range;
    const uint32_t flags = entries[i].flags;
    for (++i;
         i < entries.size() && entries[i].flags == flags && entries[i].range.begin == range.end;
         ++i) {
      range.end = entries[i].range.end;
    }
    const uint64_t pages = ToPages(range.size()).value;
    proto::PagemapEntry message;
    message.set_vaddr(range.begin.value);
    // Both counts: criu before 4.2 knows the first one only.
    message.set_compat_nr_pages(pages <= UINT32_MAX ? static_cast<uint32_t>(pages) : 0);
    message.set_flags(flags);
    message.set_nr_pages(pages);
    builder.Append(message.SerializeAsString());
  }
  return builder.data();
}

Bytes Pagemap::PresentBytes() const {
  Bytes sum;
  for (const PagemapEntry& entry : entries) {
    if ((entry.flags & kPagePresent) != 0) sum += entry.range.size();
  }
  return sum;
}

Result<Pagemap> ReadPagemap(const std::string& directory, PageStreamId id) {
  const std::string path = directory + "/" + PagemapName(id);
  UNMOOR_ASSIGN(const RawImage image, RawImage::Read(path, ImageType::kPagemap));
  const std::span<const RawImage::Message> messages = image.messages();
  if (messages.empty()) return UserError("{} ends after its magic; it is truncated", path);
  UNMOOR_ASSIGN(const proto::PagemapHead head,
                ParseMessage<proto::PagemapHead>(image, messages[0]));
  Pagemap pagemap;
  pagemap.pages_id = head.pages_id();
  uint64_t in_file = 0;
  uint64_t last_end = 0;
  for (const RawImage::Message& raw : messages.subspan(1)) {
    UNMOOR_ASSIGN(const proto::PagemapEntry entry, ParseMessage<proto::PagemapEntry>(image, raw));
    const uint64_t pages = entry.has_nr_pages() ? entry.nr_pages() : entry.compat_nr_pages();
    if (entry.vaddr() % kPageSize != 0 || entry.vaddr() < last_end ||
        entry.vaddr() >= kMaxAddress || pages == 0 ||
        pages > (kMaxAddress - entry.vaddr()) / kPageSize) {
      return UserError("{}: the entry at offset {} ({} pages at {:#x}) is damaged", path,
                       raw.offset.value, pages, entry.vaddr());
    }
    PagemapEntry result;
    result.range = {Vaddr(entry.vaddr()), Vaddr(entry.vaddr() + pages * kPageSize)};
    // Images older than the flags have only the in_parent bit.
    result.flags =
        entry.has_flags() ? entry.flags() : (entry.in_parent() ? kPageInParent : kPagePresent);
    result.pages = FileOffset(in_file);
    if ((result.flags & kPagePresent) != 0) in_file += pages * kPageSize;
    last_end = result.range.end.value;
    pagemap.entries.push_back(result);
  }
  return pagemap;
}

}  // namespace unmoor::criu
