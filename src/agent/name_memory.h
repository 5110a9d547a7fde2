// Names for anonymous memory of a program that has been restored and does not run yet
// (PR_SET_VMA_ANON_NAME): only the program itself may name its memory, so a thread of it is
// borrowed.
#pragma once

#include <span>
#include <string>

#include "base/units.h"

namespace unmoor {

struct NamedMemory {
  VaddrRange range;
  std::string name;
};

// Only names: where it does not work there is none, and no error. Does nothing on a kernel that has
// no names. Every thread of `pid` is stopped (SIGSTOP), and is again afterwards.
void NameMemory(Pid pid, std::span<const NamedMemory> memory);

}  // namespace unmoor
