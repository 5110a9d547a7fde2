// Telling whether a VMA maps a page image: remap/page_image.h, which the library shares.
#pragma once

#include "remap/page_image.h"
