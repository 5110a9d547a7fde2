/* What c_api_calls.c offers to c_api_test.cpp: each returns null, or what went wrong. */
#pragma once

#ifdef __cplusplus
extern "C" {
#endif
const char* CApiRoundTrip(const char* first, const char* second);
const char* CApiVersions(const char* dir);
const char* CApiBadInput(const char* dir);
const char* CApiMistakes(const char* dir);
#ifdef __cplusplus
}
#endif
