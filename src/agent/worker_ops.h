// Small pieces the worker's files share: VMA flags as madvise operations.
#pragma once

#include <sys/mman.h>

#include <cstdint>

#include "agent/helper_link.h"

namespace unmoor {

// MADV_* of the flags a VMA shows in smaps.
struct FlagAdvice {
  const char* flag;
  int advice;
};
inline constexpr FlagAdvice kFlagAdvice[] = {
    {"hg", MADV_HUGEPAGE},   {"nh", MADV_NOHUGEPAGE}, {"dd", MADV_DONTDUMP}, {"mg", MADV_MERGEABLE},
    {"sr", MADV_SEQUENTIAL}, {"rr", MADV_RANDOM},     {"dc", MADV_DONTFORK}};

void AddAdvice(OpList& ops, VaddrRange range, int advice);

}  // namespace unmoor
