// How a program under test tells how it is doing: one JSON object in a file, replaced as a whole.
//
// The file is open only while it is written, so that a checkpoint hardly ever meets it open. A
// check that fails ends the program at once: the report then holds the error, and the exit code is
// 1 (in a forked child 42, which its parent turns into a failure of its own). No allocation.
#pragma once

#include <cstdarg>
#include <cstdint>

namespace report {

inline constexpr int kChildFailed = 42;

// `path` may be null: no report. Call once, before any thread starts.
void Open(const char* program, const char* path);

// Replaces the report. `fields` is the inside of the JSON object, without the braces.
void Write(const char* fields);

// Ends the program: something that must hold does not.
[[noreturn]] __attribute__((format(printf, 1, 2))) void Fail(const char* format, ...);

// In a forked child: Fail() writes PATH.child instead and exits with kChildFailed.
void BecomeChild();

uint64_t NowNanos();  // CLOCK_MONOTONIC

}  // namespace report
