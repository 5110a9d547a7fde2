// LazyState: what a lazy restore has come to, as its journal tells.
//
// Every change is a record, applied by the server as it happens and by whoever follows it once
// more. What has come in the meantime is not recorded: a page in its place stays.
#pragma once

#include <list>
#include <span>
#include <string>
#include <vector>

#include "base/units.h"
#include "image/layer_source.h"
#include "lazy/address_space.h"
#include "lazy/journal.h"

namespace unmoor {

// The pages of one task of an image.
struct LazyTask {
  uint32_t vpid = 0;
  std::vector<OverlayRun> pages;       // ascending, disjoint; `layer` is one of the image's
  std::vector<VaddrRange> first = {};  // where those are that are needed first, in that order
};
struct LazyImage {
  LayerSources layers;  // with their hashes
  std::vector<LazyTask> tasks;
};

class LazyState {
 public:
  struct Adopted {
    Pid pid;
    uint32_t vpid = 0;
    bool stay_stopped = false;
  };
  struct Space {
    AddressSpace memory;
    uint32_t vpid = 0;  // of the restored task it is, or is forked from
    bool forked = false;
    // The server's to set: its pages are brought by themselves from then on,
    Nanos not_before = {};
    Nanos no_room_before = {};  // and not while there is no memory for them
    std::string no_room = {};
  };

  explicit LazyState(const LazyImage& image) : image_(image) {}
  void Apply(const LazyRecord& record);

  [[nodiscard]] Pid criu() const { return criu_; }
  [[nodiscard]] const std::vector<Adopted>& adopted() const { return adopted_; }
  [[nodiscard]] const Adopted* FindAdopted(uint32_t vpid) const;
  [[nodiscard]] bool running() const { return running_; }
  [[nodiscard]] bool finished() const { return finished_; }
  [[nodiscard]] std::list<Space>& spaces() { return spaces_; }

 private:
  [[nodiscard]] Space* FindSpace(int uffd);
  [[nodiscard]] AddressSpace MemoryOf(int uffd, uint32_t vpid) const;

  const LazyImage& image_;
  Pid criu_;
  std::vector<Adopted> adopted_;
  bool running_ = false;
  bool finished_ = false;
  std::list<Space> spaces_;
};

}  // namespace unmoor
