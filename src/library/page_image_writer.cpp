// PageImageWriter: collects ranges; Publish has BuildImage write them. See unmoor/page_image.h.
#include <sys/mman.h>

#include <algorithm>

#include "image/layout.h"
#include "library/image_build.h"
#include "library/memory_plan.h"
#include "library/status_from.h"
#include "unmoor/page_image.h"

namespace unmoor {
inline namespace v1 {

class PageImageWriter::Impl {
 public:
  Impl(Publisher publisher, const WriterOptions& options)
      : publisher_(std::move(publisher)), options_(options) {}

  Status AddMemory(MemoryRange memory) {
    // Planned again at Publish, when it is read; here for its mistakes.
    const std::span one(&memory, 1);
    UNMOOR_STATUS_ASSIGN(std::vector<PlannedRange> planned, PlanMemory(one));
    for (const PlannedRange& range : planned) {
      if (Status status = CheckApart(range.range); !status.ok()) return status;
    }
    for (const PlannedRange& range : planned) taken_.push_back(range.range);
    memory_.push_back(memory);
    return {};
  }

  Status AddSource(VaddrRange range, int protection, PageSource source) {
    if (range.begin.value % kPageSize != 0 || range.end.value % kPageSize != 0 || range.empty() ||
        range.end.value > kAddressLimit) {
      return MakeStatus(StatusCode::kInvalidArgument,
                        "the range at {} is empty, not aligned to pages of {}, or beyond all "
                        "addresses",
                        range.begin, kPageSize);
    }
    if ((protection & ~(PROT_READ | PROT_WRITE | PROT_EXEC)) != 0 || !source) {
      return MakeStatus(StatusCode::kInvalidArgument,
                        "the range at {} has no source or an unknown protection", range.begin);
    }
    if (Status status = CheckApart(range); !status.ok()) return status;
    taken_.push_back(range);
    PlannedRange planned;
    planned.range = range;
    planned.prot = protection;
    planned.source = std::move(source);
    planned.look_at = {range};
    sources_.push_back(std::move(planned));
    return {};
  }

  Status SetUserData(std::string_view bytes) {
    if (bytes.size() > kMaxUserData.value) {
      return MakeStatus(StatusCode::kInvalidArgument, "{} of user data; an image holds at most {}",
                        HumanBytes(Bytes(bytes.size())), HumanBytes(kMaxUserData));
    }
    user_data_ = bytes;
    return {};
  }

  StatusOr<ImageReport> Publish() {
    if (published_) {
      return MakeStatus(StatusCode::kInvalidArgument, "this image was published already");
    }
    published_ = true;
    BuildRequest request;
    UNMOOR_STATUS_ASSIGN(request.ranges, PlanMemory(memory_));
    request.ranges.insert(request.ranges.end(), sources_.begin(), sources_.end());
    UNMOOR_STATUS_TRY(SortRanges(request.ranges));
    request.user_data = user_data_;
    request.sync = options_.sync;
    return BuildImage(publisher_, request);
  }

 private:
  [[nodiscard]] Status CheckApart(VaddrRange range) const {
    for (const VaddrRange& other : taken_) {
      if (!other.Overlaps(range)) continue;
      return MakeStatus(StatusCode::kInvalidArgument, "the ranges {} and {} overlap", other, range);
    }
    return {};
  }

  Publisher publisher_;
  const WriterOptions options_;
  std::vector<VaddrRange> taken_;
  std::vector<MemoryRange> memory_;
  std::vector<PlannedRange> sources_;
  std::string user_data_;
  bool published_ = false;
};

PageImageWriter::PageImageWriter(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
PageImageWriter::PageImageWriter(PageImageWriter&&) noexcept = default;
PageImageWriter& PageImageWriter::operator=(PageImageWriter&&) noexcept = default;
PageImageWriter::~PageImageWriter() = default;

StatusOr<PageImageWriter> PageImageWriter::Create(const std::string& dir,
                                                  const WriterOptions& options) {
  auto publisher = BeginImage(dir, options.replace);
  if (!publisher.ok()) return publisher.status();
  return PageImageWriter(std::make_unique<Impl>(*std::move(publisher), options));
}

Status PageImageWriter::Add(MemoryRange memory) {
  return impl_->AddMemory(memory);
}

Status PageImageWriter::Add(uint64_t address, uint64_t size, int protection, PageSource source) {
  if (size > kAddressLimit || address > kAddressLimit) size = 0;
  return impl_->AddSource({Vaddr(address), Vaddr(address + size)}, protection, std::move(source));
}

Status PageImageWriter::SetUserData(std::string_view bytes) {
  return impl_->SetUserData(bytes);
}

StatusOr<ImageReport> PageImageWriter::Publish() {
  return impl_->Publish();
}

}  // namespace v1
}  // namespace unmoor
