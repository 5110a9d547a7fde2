// See helper_image.h.
#include "agent/helper_image.h"

// NOLINTNEXTLINE(hicpp-no-assembler)
asm(".section .rodata\n"
    ".balign 16\n"
    "unmoor_helper_image_begin:\n"
    ".incbin \"" UNMOOR_HELPER_BIN
    "\"\n"
    "unmoor_helper_image_end:\n"
    ".text\n");

extern "C" const std::byte unmoor_helper_image_begin[];
extern "C" const std::byte unmoor_helper_image_end[];

namespace unmoor {

std::span<const std::byte> HelperImage() {
  return {unmoor_helper_image_begin, unmoor_helper_image_end};
}

}  // namespace unmoor
