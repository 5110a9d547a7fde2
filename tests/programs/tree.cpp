// tree: a parent and two forked children that share copied-on-write memory, each with later writes.
//
// The parent fills the memory and forks; then each process writes pages of its own choice (the
// parent those of rest 0 mod 4, the children 1 and 2; rest 3 stays shared by all) again and again,
// and verifies all: its own must show its own writes, the others what they held at the fork.
// Reports: PATH of the parent, PATH.1 and PATH.2 of the children. SIGTERM to the parent ends all
// three.
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <string>

#include "region.h"

namespace {

volatile sig_atomic_t end_wanted = 0;

// Who writes page `i` after the fork: 0 the parent, 1 and 2 the children, 3 nobody.
size_t WriterOf(size_t i) {
  return i % 4;
}

class Member {
 public:
  Member(uint64_t* memory, size_t count, size_t self)
      : memory_(memory), count_(count), self_(self) {}

  void Round() {
    ++round_;
    for (size_t i = 0; i < count_; ++i) {
      uint64_t* page = memory_ + i * pages::kWords;
      if (WriterOf(i) == self_) {
        Check(page, i, round_ == 1 ? 1 : Own(round_ - 1));
        pages::Fill(page, i, Own(round_));
      } else {
        Check(page, i, 1);
      }
    }
  }

  void Report() const {
    char text[256];
    std::snprintf(text, sizeof text, "\"ready\": true, \"member\": %zu, \"rounds\": %llu", self_,
                  (unsigned long long)round_);
    report::Write(text);
  }

 private:
  uint64_t Own(uint64_t round) const { return (uint64_t{self_ + 1} << 40) + round; }

  void Check(const uint64_t* page, size_t i, uint64_t sequence) const {
    if (pages::Holds(page, i, sequence)) return;
    char what[256];
    pages::Describe(page, i, sequence, what, sizeof what);
    report::Fail("member %zu: page %zu at %p must hold write %llu but %s", self_, i,
                 static_cast<const void*>(page), (unsigned long long)sequence, what);
  }

  uint64_t* memory_;
  size_t count_;
  size_t self_;
  uint64_t round_ = 0;
};

void Live(Member& member, bool (*children_fine)()) {
  while (!end_wanted) {
    member.Round();
    member.Report();
    if (children_fine != nullptr && !children_fine()) report::Fail("a child ended");
    const timespec pause{0, 2'000'000};
    nanosleep(&pause, nullptr);
  }
}

pid_t children[2];

bool ChildrenFine() {
  int status = 0;
  return waitpid(-1, &status, WNOHANG) == 0;
}

}  // namespace

int main(int argc, char** argv) {
  std::string path;
  size_t mib = 128;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::strcmp(argv[i], "--report") == 0) path = argv[i + 1];
    if (std::strcmp(argv[i], "--mib") == 0) mib = std::strtoull(argv[i + 1], nullptr, 10);
  }
  if (path.empty() || argc % 2 == 0) {
    std::fputs("usage: tree --report FILE [--mib N]\n", stderr);
    return 2;
  }
  report::Open("tree", path.c_str());
  struct sigaction action = {};
  action.sa_handler = [](int) { end_wanted = 1; };
  sigaction(SIGTERM, &action, nullptr);
  const size_t count = mib * 256;
  auto* memory = static_cast<uint64_t*>(
      MapAnonymous(nullptr, count * pages::kSize, PROT_READ | PROT_WRITE, MAP_PRIVATE));
  for (size_t i = 0; i < count; ++i) pages::Fill(memory + i * pages::kWords, i, 1);
  for (size_t child = 1; child <= 2; ++child) {
    const pid_t pid = fork();
    if (pid < 0) report::Fail("fork: %s", std::strerror(errno));
    if (pid == 0) {
      report::Open("tree", (path + "." + std::to_string(child)).c_str());
      Member member(memory, count, child);
      Live(member, nullptr);
      _exit(0);
    }
    children[child - 1] = pid;
  }
  Member parent(memory, count, 0);
  Live(parent, ChildrenFine);
  int worst = 0;
  for (const pid_t child : children) kill(child, SIGTERM);
  for (const pid_t child : children) {
    int status = 0;
    while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
    }
    if (status != 0) worst = 1;
  }
  return worst;
}
