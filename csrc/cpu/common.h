// What every CPU kernel shares: the namespace of one instruction set, memory, and the loop over
// work items.
//
// Each kernel source is compiled once per instruction set with -DXK_ISA=<level>:
//   0 portable (GCC vector extensions), 1 AVX2 + FMA, 2 AVX-512 + BF16, 3 AVX-512 without BF16.
// Everything lives in a namespace of that level. Templates of the standard library are instantiated
// with types of that namespace only: the linker keeps one copy of each template, and it must not be
// one with foreign instructions.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "../kernels.h"

#ifndef XK_ISA
#error "compile with -DXK_ISA=0, 1, 2 or 3"
#endif
#define XK_JOIN2(a, b) a##b
#define XK_JOIN(a, b) XK_JOIN2(a, b)
#define XK_NS XK_JOIN(isa, XK_ISA)

namespace xk::XK_NS {

constexpr int64_t kCacheLine = 64;

constexpr int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max64(int64_t a, int64_t b) { return a < b ? b : a; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// Uninitialised memory on cache-line boundaries.
template <class T>
struct Buffer {
  T* data = nullptr;
  Buffer() = default;
  explicit Buffer(int64_t count) {
    const int64_t bytes = round_up(max64(count, 1) * int64_t(sizeof(T)), kCacheLine);
    data = static_cast<T*>(std::aligned_alloc(kCacheLine, size_t(bytes)));
    if (!data) throw std::bad_alloc();
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data); }
};

// Calls f(item, worker) once for every item in 0..items. Workers take items from one counter as
// they become free, in ascending order: on a machine that also does other things this keeps all
// cores busy to the end. What a kernel computes must therefore belong to the item, never to the
// worker.
template <class F>
struct WorkLoop {
  F* f;
  int64_t items;
  std::atomic<int64_t> next{0};

  static void body(int64_t begin, int64_t end, void* ctx) {
    auto* loop = static_cast<WorkLoop*>(ctx);
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t i; (i = loop->next.fetch_add(1, std::memory_order_relaxed)) < loop->items;)
        (*loop->f)(i, worker);
  }
};

inline int64_t worker_count(const Host& host, int64_t items) {
  return max64(1, min64(host.threads(), items));
}

template <class F>
inline void for_each_item(const Host& host, int64_t items, F f) {
  if (items <= 0) return;
  WorkLoop<F> loop{&f, items};
  host.parallel_for(worker_count(host, items), &WorkLoop<F>::body, &loop);
}

}  // namespace xk::XK_NS
