#include "carry.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace xmlkernels::host {

namespace {

// Bytes of one request at most: a disk reads several such requests faster than one long one.
constexpr std::int64_t kRequest = std::int64_t{1} << 20;

struct Request {
    std::int64_t piece, at, bytes, needed;  // `at`: bytes of the piece before it
};

std::vector<Request> requests(const Pieces& pieces) {
    std::vector<Request> out;
    out.reserve(static_cast<std::size_t>(pieces.count));
    for (std::int64_t i = 0; i < pieces.count; ++i) {
        const std::int64_t bytes = (pieces.bytes[i] + kPage - 1) / kPage * kPage;
        for (std::int64_t at = 0; at < bytes; at += kRequest) {
            const std::int64_t count = std::min(kRequest, bytes - at);
            out.push_back({i, at, count, std::min(count, pieces.bytes[i] - at)});
        }
    }
    return out;
}

// Returns errno, 0 where the file ended, or -1 when all is done.
int one(const Pieces& pieces, const Request& r, bool writes) {
    const int file = static_cast<int>(pieces.file[r.piece]);
    char* const memory = reinterpret_cast<char*>(pieces.address[r.piece] + r.at);
    const off_t place = static_cast<off_t>(pieces.place[r.piece] + r.at);
    const std::int64_t wanted = writes ? r.bytes : r.needed;
    for (std::int64_t done = 0; done < wanted;) {
        const std::size_t left = static_cast<std::size_t>(r.bytes - done);
        const ssize_t got = writes ? pwrite(file, memory + done, left, place + done)
                                   : pread(file, memory + done, left, place + done);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) return errno;
        if (got == 0) return 0;
        done += got;
    }
    return -1;
}

}  // namespace

Failed carry(const Pieces& pieces, bool writes, int threads) {
    const std::vector<Request> all = requests(pieces);
    std::atomic<std::size_t> next{0};
    std::atomic<bool> broken{false};
    std::mutex mutex;
    Failed failed;
    const auto work = [&] {
        for (;;) {
            const std::size_t i = next.fetch_add(1, std::memory_order_relaxed);
            if (i >= all.size() || broken.load(std::memory_order_relaxed)) return;
            const int error = one(pieces, all[i], writes);
            if (error < 0) continue;
            broken = true;
            const std::lock_guard<std::mutex> lock(mutex);
            if (failed.piece < 0 || all[i].piece < failed.piece) failed = {all[i].piece, error};
        }
    };
    const std::size_t count = std::min(static_cast<std::size_t>(std::max(threads, 1)), all.size());
    std::vector<std::thread> others;
    for (std::size_t t = 1; t < count; ++t) {
        try {
            others.emplace_back(work);
        } catch (const std::system_error&) {
            break;  // the system gives no more: fewer requests are on their way
        }
    }
    work();
    for (std::thread& other : others) other.join();
    return failed;
}

}  // namespace xmlkernels::host
