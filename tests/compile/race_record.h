// What the emulated card tells the race record (race_record.cpp), and asks of it. Code that is compiled with
// -fsanitize=thread calls a function before each load and store; the record is that function, in the sanitizer's place.
#pragma once

#include <cstdint>
#include <vector>

namespace race {

// Code of the emulation, whose accesses are not the kernel's. Nothing here is inline: it would be recorded.
class Quiet {
 public:
  explicit Quiet(uint32_t thread);
  ~Quiet();

 private:
  const uint32_t thread_;
};

// Writes of one value by many, which the next launch reads: no race, if they are named here and that value is found.
struct Meant {
  const char* kernel;
  const int32_t* address;
  int32_t value;
};
extern std::vector<Meant> meant;

void begin_launch(const char* kernel, int threads);
void end_launch();
void begin_block(uint32_t block);
void enter(uint32_t thread, const char* stack_begin, const char* stack_end);  // that thread runs from here on
void leave();                                                                 // and no longer
void join(const std::vector<uint32_t>& threads);  // a barrier that these have reached
void atomic(const void* address, int size);

}  // namespace race
