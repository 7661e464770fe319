// Many pieces of files read into memory, or written from it, several at once. Knows nothing of
// Python or tensors.
#pragma once

#include <cstdint>

namespace xmlkernels::host {

// Pieces [count], each of whole pages in file and memory; the last page of one may be needed in
// part alone.
struct Pieces {
    std::int64_t count = 0;
    const std::int64_t* file = nullptr;     // descriptor
    const std::int64_t* place = nullptr;    // its first byte in the file
    const std::int64_t* address = nullptr;  // and in memory
    const std::int64_t* bytes = nullptr;    // that are needed; whole pages are carried
};

// The first piece that was not carried, and why.
struct Failed {
    std::int64_t piece = -1;  // -1: all were
    int error = 0;            // errno; 0: the file ended
};

constexpr std::int64_t kPage = 4096;

// Read or write all of them by up to `threads` threads, each with one request on its way.
Failed carry(const Pieces& pieces, bool writes, int threads);

}  // namespace xmlkernels::host
