// Which control groups limit a process's memory, and what is left in them.
#include "os/memory_room.h"

#include <gtest/gtest.h>

#include <cerrno>

#include "os/process_control.h"

namespace unmoor {
namespace {

using Groups = std::vector<MemoryGroup>;

TEST(FindMemoryGroups, EachWithAllAboveIt) {
  const std::string memberships =
      "4:cpu,memory:/jobs/one\n"
      "3:cpuset:/elsewhere\n"
      "0::/slice/unit\n";
  const std::string mounts =
      "30 20 0:28 / /sys/fs/cgroup/cpuset rw,relatime shared:5 - cgroup cgroup rw,cpuset\n"
      "31 20 0:29 / /sys/fs/cgroup/memory rw,relatime shared:6 - cgroup cgroup rw,memory\n"
      "32 20 0:30 / /sys/fs/cgroup/unified rw - cgroup2 none rw\n";
  const Groups expected = {
      {"/sys/fs/cgroup/memory/jobs/one", false}, {"/sys/fs/cgroup/memory/jobs", false},
      {"/sys/fs/cgroup/memory", false},          {"/sys/fs/cgroup/unified/slice/unit", true},
      {"/sys/fs/cgroup/unified/slice", true},    {"/sys/fs/cgroup/unified", true}};
  EXPECT_EQ(FindMemoryGroups(memberships, mounts), expected);
}

// As in a container that sees its own group as the root of the mount.
TEST(FindMemoryGroups, OfAMountThatShowsAPartOnlyThatPart) {
  const std::string mounts = "31 20 0:29 /docker/77 /cg rw - cgroup2 cgroup2 rw,nsdelegate\n";
  EXPECT_EQ(FindMemoryGroups("0::/docker/77/child\n", mounts),
            (Groups{{"/cg/child", true}, {"/cg", true}}));
  EXPECT_EQ(FindMemoryGroups("0::/docker/77\n", mounts), (Groups{{"/cg", true}}));
  EXPECT_EQ(FindMemoryGroups("0::/docker/778\n", mounts), Groups());
  EXPECT_EQ(FindMemoryGroups("0::/../other\n", mounts), Groups());
  EXPECT_EQ(FindMemoryGroups("nonsense\n", "nonsense\n"), Groups());
}

TEST(MemoryRoom, HasRoomForALittleAndNotForMoreThanThereIs) {
  MemoryRoom room(OwnPid());
  room.FindGroups();
  EXPECT_TRUE(room.Take(Bytes(4096)));
  const auto refused = room.Take(Bytes(uint64_t{1} << 50));
  ASSERT_FALSE(refused);
  EXPECT_EQ(refused.error().errnum(), ENOMEM);
  EXPECT_NE(refused.error().message().find("memory to spare"), std::string::npos);
}

}  // namespace
}  // namespace unmoor
