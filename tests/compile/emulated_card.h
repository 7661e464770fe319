// Just enough of a card to run CUDA kernels as host code: the threads of a block are fibers that change at every sync,
// blocks run one after another. It checks what threads exchange, and that every sync is reached by all that it names.
// Another order of threads and blocks (emu::reverse) must change no result, and the race record sees every access.
#pragma once

#include <cuda_runtime.h>  // types and declarations
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "race_record.h"

namespace emu {

struct Index {
  uint32_t x, y = 0;
};
struct Barrier {
  std::vector<uint32_t> arrived;
  int generation = 0;
};
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
};
constexpr size_t kStack = 64 << 10;

inline bool reverse = false;
inline Index thread, block, grid;
inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline std::map<uint64_t, Barrier> barriers;  // of the block (key 0), and of each set of lanes of each warp
inline uint32_t exchanged[1024];
inline int64_t progress = 0;

inline void fiber_main() {
  body();
  const race::Quiet quiet(thread.x);
  fibers[thread.x].done = true;
  ++progress;
}

// The last to arrive does what is `then` to be done, before any goes on.
template <class F>
void arrive(uint64_t key, int expected, const F& then) {
  const race::Quiet quiet(thread.x);
  Barrier& b = barriers[key];
  const int generation = b.generation;
  ++progress;
  b.arrived.push_back(thread.x);
  if (int(b.arrived.size()) == expected) {
    race::join(b.arrived);
    b.arrived.clear();
    ++b.generation;
    then();
    return;
  }
  const uint32_t me = thread.x;
  while (barriers[key].generation == generation) swapcontext(&fibers[me].context, &scheduler);
}

inline void arrive(uint64_t key, int expected) {
  arrive(key, expected, [] {});
}

inline void run_block(int threads) {
  fibers = std::vector<Fiber>(threads);
  barriers.clear();
  for (Fiber& f : fibers) {
    f.stack.reset(new char[kStack]);
    getcontext(&f.context);
    f.context.uc_stack = {f.stack.get(), 0, kStack};
    f.context.uc_link = &scheduler;
    makecontext(&f.context, &fiber_main, 0);
  }
  for (int left = threads; left > 0;) {
    const int64_t before = progress;
    left = 0;
    for (int i = 0; i < threads; ++i) {
      thread.x = uint32_t(reverse ? threads - 1 - i : i);
      if (fibers[thread.x].done) continue;
      const char* const stack = fibers[thread.x].stack.get();
      race::enter(thread.x, stack, stack + kStack);
      swapcontext(&scheduler, &fibers[thread.x].context);
      race::leave();
      left += !fibers[thread.x].done;
    }
    if (left && progress == before) {
      std::fprintf(stderr, "%d threads wait for others that do not come\n", left);
      std::abort();
    }
  }
}

template <class... P>
struct Launch {
  const char* name;
  void (*kernel)(P...);
  uint32_t blocks;
  int threads;
  template <class... A>
  void operator()(const A&... args) const {
    body = [&] { kernel(args...); };
    grid.x = blocks;
    race::begin_launch(name, threads);
    for (uint32_t i = 0; i < blocks; ++i) {
      block.x = reverse ? blocks - 1 - i : i;
      race::begin_block(block.x);
      run_block(threads);
    }
    race::end_launch();
  }
};
template <class... P>
Launch<P...> launch(const char* name, void (*kernel)(P...), uint32_t blocks, int threads) {
  return {name, kernel, blocks, threads};
}

// A value of each lane that `mask` names, for all of them to read.
template <class F>
auto exchange(uint32_t mask, uint32_t value, const F& read) {
  const race::Quiet quiet(thread.x);
  const uint32_t warp = thread.x / 32;
  const uint64_t key = (uint64_t(warp + 1) << 32) | mask;
  const int lanes = __builtin_popcount(mask);
  if (!(mask >> (thread.x % 32) & 1)) std::abort();
  exchanged[thread.x] = value;
  arrive(key, lanes);
  const auto result = read(&exchanged[warp * 32]);
  arrive(key, lanes);
  return result;
}

}  // namespace emu

#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __shared__
#define threadIdx emu::thread
#define blockIdx emu::block
#define gridDim emu::grid
#define __shared__ static thread_local  // which the race record finds together
#define XK_LAUNCH(kernel, blocks, threads, stream) emu::launch(#kernel, kernel, blocks, threads)

inline void __syncthreads() { emu::arrive(0, int(emu::fibers.size())); }
inline int __syncthreads_or(int predicate) {
  const race::Quiet quiet(emu::thread.x);
  static int any[2];  // this barrier's, and the next one's: cleared while nobody reads it
  static int turn = 0;
  any[turn] |= predicate != 0;
  const int mine = turn;
  emu::arrive(0, int(emu::fibers.size()), [&] { turn = 1 - turn, any[turn] = 0; });
  return any[mine];
}
inline void __syncwarp(uint32_t mask) {
  emu::exchange(mask, 0, [](const uint32_t*) { return 0; });
}
inline float __shfl_xor_sync(uint32_t mask, float value, int distance) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = emu::exchange(mask, bits, [=](const uint32_t* warp) { return warp[(emu::thread.x % 32) ^ distance]; });
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t __ballot_sync(uint32_t mask, bool predicate) {
  return emu::exchange(mask, predicate, [=](const uint32_t* warp) {
    uint32_t all = 0;
    for (int lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1) all |= warp[lane] << lane;
    return all;
  });
}
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline uint32_t atomicAdd(uint32_t* p, uint32_t value) {
  race::atomic(p, sizeof *p);
  const race::Quiet quiet(emu::thread.x);
  const uint32_t before = *p;
  *p += value;
  return before;
}

inline cudaError_t emulated_last_error() { return cudaSuccess; }
#define cudaGetLastError emulated_last_error
#define cudaGetErrorString(error) "no error"
