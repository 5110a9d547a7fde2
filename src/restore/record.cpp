// See record.h.
#include "restore/record.h"

#include <fcntl.h>

#include <algorithm>

#include "image/layout.h"
#include "image/manifest.h"
#include "os/file.h"
#include "os/pagemap.h"
#include "os/process_control.h"

namespace unmoor {
namespace {

// Often at first, when order matters most.
constexpr Nanos kEarlyInterval{1'000'000};
constexpr Nanos kLateInterval{10'000'000};
constexpr Nanos kEarly{200'000'000};

VaddrRange AsAddresses(FileRange range) {
  return {Vaddr(range.begin.value), Vaddr(range.end.value)};
}

}  // namespace

Result<Recorder> Recorder::Begin(const std::vector<Pid>& tasks, const std::string& directory) {
  Recorder recorder;
  UNMOOR_ASSIGN(const Manifest manifest, ReadManifest(directory));
  recorder.checkpoint_id_ = manifest.checkpoint_id;
  for (const ManifestLayer& entry : manifest.layers) {
    UNMOOR_ASSIGN(LayerReader layer, LayerReader::Open(directory, entry));
    UNMOOR_ASSIGN(const struct stat info, StatFd(layer.pages_fd().get(), layer.pages_path()));
    recorder.inodes_.push_back(info.st_ino);
    recorder.set_.layers.push_back(layer.id());
    recorder.layers_.push_back(std::move(layer));
  }
  recorder.seen_.resize(recorder.layers_.size());
  for (const Pid pid : tasks) {
    UNMOOR_ASSIGN(Fd pagemap, OpenFile(fmt::format("/proc/{}/pagemap", pid.value), O_RDONLY));
    recorder.tasks_.push_back({pid, std::move(pagemap)});
  }
  if (!recorder.Look()) return UserError("nothing maps {}; there is nothing to record", directory);
  return recorder;
}

std::optional<uint32_t> Recorder::LayerOf(const VmaInfo& vma) const {
  if (vma.shared || vma.inode == 0) return std::nullopt;
  for (size_t i = 0; i < layers_.size(); ++i) {
    if (inodes_[i] == vma.inode && vma.name.find(layers_[i].id()) != std::string::npos) {
      return static_cast<uint32_t>(i);
    }
  }
  return std::nullopt;
}

void Recorder::Note(uint32_t layer, FileRange range) {
  const auto& segments = layers_[layer].segments();
  for (const VaddrRange fresh : seen_[layer].Outside(AsAddresses(range))) {
    auto segment = std::ranges::upper_bound(
        segments, fresh.begin.value, {}, [](const Segment& s) { return s.file_range().end.value; });
    for (; segment != segments.end() && segment->offset.value < fresh.end.value; ++segment) {
      const FileRange data = segment->file_range();
      set_.ranges.push_back({layer,
                             {FileOffset(std::max(fresh.begin.value, data.begin.value)),
                              FileOffset(std::min(fresh.end.value, data.end.value))}});
    }
    seen_[layer].Insert(fresh);
  }
}

bool Recorder::Look() {
  bool mapped = false;
  for (const Task& task : tasks_) {
    const auto vmas = ReadMaps(task.pid);
    if (!vmas) continue;  // it has ended
    for (const VmaInfo& vma : *vmas) {
      const auto layer = LayerOf(vma);
      if (!layer) continue;
      mapped = true;
      const auto present = ScanPages(task.pagemap.get(), vma.range, PageQuery::kPresent, false);
      if (!present) continue;
      for (const VaddrRange& range : *present) {
        const FileOffset begin = vma.offset + (range.begin - vma.range.begin);
        Note(*layer, {begin, begin + range.size()});
      }
    }
  }
  return mapped && set_.ranges.size() < kMaxWorkingSetRanges / 2;
}

WorkingSet Recorder::TakeResult() {
  return std::move(set_);
}

Result<RecordReport> RecordWorkingSet(const RecordOptions& options, InterruptFd& interrupt) {
  const Nanos begin = MonotonicNow();
  UNMOOR_ASSIGN(Recorder recorder, Recorder::Begin(options.tasks, options.directory));
  for (;;) {
    const Nanos passed = MonotonicNow() - begin;
    Nanos pause = passed < kEarly ? kEarlyInterval : kLateInterval;
    if (options.until >= Nanos(0)) pause = std::min(pause, options.until - passed);
    if (pause <= Nanos(0)) break;
    UNMOOR_ASSIGN(const bool interrupted, WaitReadable(interrupt.get(), pause));
    if (!recorder.Look() || interrupted) break;
  }
  (void)interrupt.Take();
  const WorkingSet set = recorder.TakeResult();
  if (set.ranges.empty()) {
    const auto earlier = ReadWorkingSet(options.directory);
    if (earlier && *earlier && !(*earlier)->ranges.empty()) {
      return RecordReport{(*earlier)->size(), (*earlier)->ranges.size(), MonotonicNow() - begin,
                          true};
    }
  }
  UNMOOR_TRY(WriteWorkingSet(options.directory, recorder.checkpoint_id(), set));
  return RecordReport{set.size(), set.ranges.size(), MonotonicNow() - begin, false};
}

}  // namespace unmoor
