// What this machine can do at best: memory read, and 8-bit multiply-adds with
// vpdpbusd. Prints JSON. Usage: machine THREADS

#include <immintrin.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

namespace {

double seconds(int threads, const std::function<void(int)>& work) {
  double best = 1e9;
  for (int pass = 0; pass < 5; ++pass) {
    const auto began = std::chrono::steady_clock::now();
    std::vector<std::thread> running;
    for (int t = 0; t < threads; ++t) running.emplace_back(work, t);
    for (auto& thread : running) thread.join();
    const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - began;
    if (taken.count() < best) best = taken.count();
  }
  return best;
}

std::atomic<int64_t> sink;

}  // namespace

int main(int argc, char** argv) {
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  const int64_t bytes = int64_t{512} << 20;
  auto* data = static_cast<char*>(std::aligned_alloc(1 << 21, bytes));
  std::memset(data, 1, bytes);
  const double read = seconds(threads, [&](int t) {
    const int64_t each = bytes / threads;
    const char* p = data + t * each;
    __m512i sums[4] = {};
    for (int64_t i = 0; i + 256 <= each; i += 256)
      for (int j = 0; j < 4; ++j)
        sums[j] = _mm512_xor_si512(sums[j], _mm512_load_si512(p + i + 64 * j));
    for (auto& s : sums) sink += _mm512_reduce_add_epi64(s);
  });
  const int64_t rounds = 10'000'000;
  const double multiply = seconds(threads, [&](int t) {
    __m512i acc[12], x = _mm512_set1_epi8(static_cast<char>(t + 1));
    for (auto& a : acc) a = x;
    for (int64_t i = 0; i < rounds; ++i)
      for (auto& a : acc) a = _mm512_dpbusd_epi32(a, x, x);
    for (auto& a : acc) sink += _mm512_reduce_add_epi32(a);
  });
  std::printf("{\"read_GB/s\": %.1f, \"vpdpbusd_GMAC/s\": %.0f}\n", bytes / read / 1e9,
              64.0 * 12 * rounds * threads / multiply / 1e9);
}
