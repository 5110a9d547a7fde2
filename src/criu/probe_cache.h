// A cache of criu's kernel probes, where criu keeps none itself.
//
// At each start criu asks the kernel what it can do; taking down the network namespace made for
// that alone lasts 20–40 ms, most of a small restore. It remembers the answers in /run/criu.kdat,
// but only where /run is a tmpfs, since they must not outlive the boot. Elsewhere we keep them, in
// a file of /run whose name holds the boot id and the criu binary's identity, made by running `criu
// check` once in a mount namespace of its own with a tmpfs on /run. For the duration of one criu
// run that file is also linked as /run/criu.kdat, and between runs nothing of criu's own is there.
//
// Nothing here fails: without the cache criu is merely slower. A /run/criu.kdat that is not ours is
// left alone. UNMOOR_PROBE_CACHE=off in the environment switches all this off. Runs side by side
// may take the link from each other, which costs one of them the probe.
#pragma once

#include <string>
#include <vector>

#include "base/result.h"

namespace unmoor::criu {

class ProbeCache {
 public:
  // `command`: how to start criu, without an action. `binary`: the file that tells one criu from
  // another.
  [[nodiscard]] static ProbeCache Install(const std::vector<std::string>& command,
                                          const std::string& binary);
  ProbeCache(ProbeCache&& other) noexcept : ours_(std::move(other.ours_)) { other.ours_.clear(); }
  ProbeCache& operator=(ProbeCache&&) = delete;
  ProbeCache(const ProbeCache&) = delete;
  ProbeCache& operator=(const ProbeCache&) = delete;
  ~ProbeCache();

 private:
  explicit ProbeCache(std::string ours) : ours_(std::move(ours)) {}
  std::string ours_;  // the file that is linked; empty: nothing to take away
};

}  // namespace unmoor::criu
