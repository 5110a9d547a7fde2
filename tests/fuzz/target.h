// A fuzz target: one function over bytes that must neither crash, nor hang, nor allocate what the
// bytes ask for. Built twice: with driver.cpp (a fixed number of seeded mutations of the corpus;
// part of tools/test) and, preset `fuzz`, with libFuzzer and sanitizers (tools/test --long).
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
