#include "cpu/stream_store.h"

#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace moment_ops::cpu {

#if defined(__x86_64__)

namespace {

// Copies whole cache lines to an aligned address; the widest stores leave the write-combining buffers fullest.
__attribute__((target("default"))) void stream_lines(const char* from, char* to, int64_t lines) {
  for (int64_t i = 0; i < 4 * lines; ++i) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, _mm_loadu_si128(reinterpret_cast<const __m128i*>(from) + i));
  }
}

#if defined(__GNUC__) && !defined(__clang__)
__attribute__((target("avx512f"))) void stream_lines(const char* from, char* to, int64_t lines) {
  for (int64_t i = 0; i < lines; ++i) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to) + i, _mm512_loadu_si512(from + 64 * i));
  }
}
#endif

}  // namespace

void stream_store(const void* from, void* to, int64_t bytes) {
  const char* source = static_cast<const char*>(from);
  char* target = static_cast<char*>(to);
  const int64_t head = (64 - reinterpret_cast<uintptr_t>(target) % 64) % 64;
  if (bytes < head + 64) {
    std::memcpy(target, source, bytes);
    return;
  }
  std::memcpy(target, source, head);
  const int64_t lines = (bytes - head) / 64;
  stream_lines(source + head, target + head, lines);
  const int64_t done = head + 64 * lines;
  std::memcpy(target + done, source + done, bytes - done);
}

void stream_fence() { _mm_sfence(); }

#else

void stream_store(const void* from, void* to, int64_t bytes) { std::memcpy(to, from, bytes); }

void stream_fence() {}

#endif

}  // namespace moment_ops::cpu
