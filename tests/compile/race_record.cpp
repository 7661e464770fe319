// The race record: every load and store of a launch, and whether two of them that meet are ordered.
//
// Blocks are never ordered: no byte that one writes may be read or written by another. Threads of a block are ordered by
// the barriers that both have reached, of the block or of lanes of a warp; a vector of clocks for each thread says
// which. Two atomics never race. The order in which the emulation runs them does not matter: what is found holds for
// every order with the same branches.
#include "race_record.h"

#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <unordered_map>

namespace race {

std::vector<Meant> meant;

namespace {

bool on = false;      // else nothing is recorded
bool inside = false;  // a thread of the kernel runs, not the scheduler
uint32_t quiet[1024];  // by thread: how deep it is in code of the emulation

constexpr uint32_t kNone = ~0u;
constexpr int kPage = 64;

struct Cell {  // of one byte
  uint32_t write_block = kNone, write_thread = 0, write_clock = 0;
  uint32_t read_block = kNone, read_thread = 0, read_clock = 0;  // of the last block that read
  bool write_atomic = false, read_by_many_blocks = false;
  std::vector<uint32_t> reads;  // clock by thread, where several of the block have read it
};
struct Page {
  Cell cells[kPage];
};

std::unordered_map<uintptr_t, Page> pages, shared_pages;
std::vector<std::vector<uint32_t>> clocks;
const char *kernel, *shared_begin, *shared_end, *stack_begin, *stack_end;
uint32_t block, thread;
int threads;
std::map<std::string, int64_t> launches;
std::vector<std::string> found;
int64_t accesses;

// Shared memory is what this library has for each thread of the process, of which there is one.
thread_local volatile char first_of_shared;

int look_for_shared(dl_phdr_info* library, size_t, void*) {
  const auto* const data = static_cast<const char*>(library->dlpi_tls_data);
  for (int i = 0; data && i < library->dlpi_phnum; ++i) {
    const auto& part = library->dlpi_phdr[i];
    const char* const address = const_cast<const char*>(&first_of_shared);
    if (part.p_type != PT_TLS || address < data || address >= data + part.p_memsz) continue;
    shared_begin = data, shared_end = data + part.p_memsz;
    return 1;
  }
  return 0;
}

void find_shared() {
  first_of_shared = 0;
  if (!dl_iterate_phdr(&look_for_shared, nullptr)) std::abort();
}

bool is_meant(const char* address) {
  for (const Meant& m : meant) {
    const char* const at = reinterpret_cast<const char*>(m.address);
    if (!std::strcmp(m.kernel, kernel) && at <= address && address < at + 4) return true;
  }
  return false;
}

void report(const char* what, const char* address, uint32_t other_block, uint32_t other) {
  char line[256];
  const bool shared = shared_begin <= address && address < shared_end;
  std::snprintf(line, sizeof line, "%s: %s of %s memory, blocks %u and %u, threads %u and %u", kernel, what,
                shared ? "shared" : "global", other_block, block, other, thread);
  if (found.size() < 100 && std::find(found.begin(), found.end(), line) == found.end()) found.push_back(line);
}

bool ordered(uint32_t other, uint32_t clock) { return other == thread || clocks[thread][other] >= clock; }

void touch(Cell& c, const char* address, bool write, bool atomic) {
  if (c.write_block != kNone && !(atomic && c.write_atomic) && !(write && is_meant(address))) {
    const char* const what = write ? "two writes" : "a write and a read";
    if (c.write_block != block || !ordered(c.write_thread, c.write_clock))
      report(what, address, c.write_block, c.write_thread);
  }
  if (!write) {
    if (c.read_block != kNone && c.read_block != block) {
      c.read_by_many_blocks = true;
      c.reads.clear();
    } else if (c.read_block == block && c.read_thread != thread && c.reads.empty()) {
      c.reads.resize(threads);
      c.reads[c.read_thread] = c.read_clock;
    }
    c.read_block = block, c.read_thread = thread, c.read_clock = clocks[thread][thread];
    if (!c.reads.empty()) c.reads[thread] = c.read_clock;
    return;
  }
  if (c.read_block != kNone) {
    if (c.read_by_many_blocks || c.read_block != block) {
      report("a read and a write", address, c.read_block, c.read_thread);
    } else if (c.reads.empty()) {
      if (!ordered(c.read_thread, c.read_clock)) report("a read and a write", address, block, c.read_thread);
    } else {
      for (uint32_t t = 0; t < c.reads.size(); ++t)
        if (c.reads[t] && !ordered(t, c.reads[t])) report("a read and a write", address, block, t);
    }
  }
  c.write_block = block, c.write_thread = thread, c.write_clock = clocks[thread][thread], c.write_atomic = atomic;
}

void access(const void* pointer, int64_t size, bool write, bool atomic) {
  const char* const first = static_cast<const char*>(pointer);
  if (stack_begin <= first && first < stack_end) return;
  auto& where = shared_begin <= first && first < shared_end ? shared_pages : pages;
  ++accesses;
  for (const char* p = first; p < first + size; ++p) {
    const auto at = reinterpret_cast<uintptr_t>(p);
    touch(where[at / kPage].cells[at % kPage], p, write, atomic);
  }
}

}  // namespace

void begin_launch(const char* name, int size) {
  if (!on) return;
  kernel = name, threads = size;
  find_shared();
  pages.clear();
  ++launches[kernel];
}

void end_launch() {
  if (!on) return;
  for (const Meant& m : meant)
    if (!std::strcmp(m.kernel, kernel) && pages.count(reinterpret_cast<uintptr_t>(m.address) / kPage)) {
      const auto at = reinterpret_cast<uintptr_t>(m.address);
      const bool written = pages[at / kPage].cells[at % kPage].write_block != kNone;
      if (written && *m.address != m.value) found.push_back(std::string(kernel) + ": another value than the one meant");
    }
}

void begin_block(uint32_t index) {
  if (!on) return;
  block = index;
  shared_pages.clear();
  clocks.assign(threads, std::vector<uint32_t>(threads));
  for (int t = 0; t < threads; ++t) clocks[t][t] = 1;
}

void enter(uint32_t index, const char* begin, const char* end) {
  thread = index, stack_begin = begin, stack_end = end;
  inside = true;
}

void leave() { inside = false; }

Quiet::Quiet(uint32_t thread) : thread_(thread) { ++quiet[thread]; }
Quiet::~Quiet() { --quiet[thread_]; }

void join(const std::vector<uint32_t>& members) {
  if (!on) return;
  std::vector<uint32_t> all(threads);
  for (const uint32_t t : members)
    for (int i = 0; i < threads; ++i) all[i] = std::max(all[i], clocks[t][i]);
  for (const uint32_t t : members) {
    clocks[t] = all;
    ++clocks[t][t];
  }
}

void atomic(const void* address, int size) {
  if (on && inside) access(address, size, true, true);
}

}  // namespace race

extern "C" {

void record_races(int64_t wanted) {
  race::on = wanted;
  race::launches.clear(), race::found.clear();
  race::accesses = 0;
}

// What has been recorded: a line for each kernel with its launches, one with the accesses, then the races.
int64_t races_found(char* text, int64_t size) {
  std::string out;
  for (const auto& [kernel, count] : race::launches) out += kernel + " " + std::to_string(count) + "\n";
  out += "accesses " + std::to_string(race::accesses) + "\n";
  for (const std::string& line : race::found) out += line + "\n";
  std::snprintf(text, size_t(size), "%s", out.c_str());
  return int64_t(race::found.size());
}

#define XK_RECORD(name, size, write)                                                               \
  void __tsan_##name(void* p) {                                                                    \
    if (race::on && race::inside && !race::quiet[race::thread]) race::access(p, size, write, false); \
  }
#define XK_SIZES(prefix, kind, write) \
  XK_RECORD(prefix##kind##2, 2, write) XK_RECORD(prefix##kind##4, 4, write) \
  XK_RECORD(prefix##kind##8, 8, write) XK_RECORD(prefix##kind##16, 16, write)
XK_RECORD(read1, 1, false)
XK_RECORD(write1, 1, true)
XK_SIZES(, read, false)
XK_SIZES(, write, true)
XK_SIZES(unaligned_, read, false)
XK_SIZES(unaligned_, write, true)
void __tsan_read_range(void* p, long size) {
  if (race::on && race::inside && !race::quiet[race::thread]) race::access(p, size, false, false);
}
void __tsan_write_range(void* p, long size) {
  if (race::on && race::inside && !race::quiet[race::thread]) race::access(p, size, true, false);
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
}
