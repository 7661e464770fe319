#include "sparse_text.h"

#include <atomic>
#include <exception>
#include <mutex>
#include <thread>

#include "sparse_row.h"

namespace xmlkernels::host {
namespace {

// Upper bounds of what a chunk holds; exact for a file without comments, qid and duplicates.
struct Counts {
    std::int64_t lines = 0, tokens = 0, colons = 0, commas = 0;
};

struct Chunk {
    const char* begin;
    const char* end;
    Counts counts;
    std::int64_t first_row = 0;
    std::int64_t feature_offset = 0, label_offset = 0;  // into the shared arrays
    std::int64_t features = 0, labels = 0;              // what was read
    Problem problem;
};

std::uint8_t is_space(char c, char comma) {
    return static_cast<std::uint8_t>((c == ' ') | ((c >= '\t') & (c <= '\r')) | (c == comma));
}

// Counters of one byte over short blocks: the compiler turns the loop into byte-wide vector
// instructions.
Counts count(const char* begin, const char* end, bool comma_splits) {
    Counts total;
    const char comma = comma_splits ? ',' : ' ';
    std::uint8_t carried = 1;  // a chunk begins at a line's beginning
    for (const char* p = begin; p < end;) {
        const std::int64_t n = std::min<std::int64_t>(end - p, 255);
        std::uint8_t lines = 0, starts = 0, colons = 0, commas = 0;
        starts += static_cast<std::uint8_t>((is_space(p[0], comma) ^ 1) & carried);
        for (std::int64_t i = 1; i < n; ++i) {
            starts +=
                static_cast<std::uint8_t>((is_space(p[i], comma) ^ 1) & is_space(p[i - 1], comma));
        }
        for (std::int64_t i = 0; i < n; ++i) {
            lines += p[i] == '\n';
            colons += p[i] == ':';
            commas += p[i] == ',';
        }
        carried = is_space(p[n - 1], comma);
        total.lines += lines, total.tokens += starts, total.colons += colons,
            total.commas += commas;
        p += n;
    }
    if (begin < end && end[-1] != '\n') ++total.lines;
    return total;
}

std::vector<Chunk> split(const char* begin, const char* end, int threads) {
    // Small enough to balance threads and to stay in the second pass's cache reach, large enough to
    // cost nothing.
    constexpr std::int64_t kMost = std::int64_t{4} << 20, kLeast = std::int64_t{64} << 10;
    const std::int64_t size = std::clamp((end - begin) / (4 * threads) + 1, kLeast, kMost);
    std::vector<Chunk> chunks;
    while (begin < end) {
        const char* stop = end - begin > size ? begin + size : end;
        if (stop < end) {
            const void* newline = std::memchr(stop, '\n', static_cast<std::size_t>(end - stop));
            stop = newline != nullptr ? static_cast<const char*>(newline) + 1 : end;
        }
        chunks.push_back({begin, stop, {}, 0, 0, 0, 0, 0, {}});
        begin = stop;
    }
    return chunks;
}

// Runs work(i) for i < n, in order of i over all threads; the first exception is thrown again here.
template <class Work>
void parallel_for(std::size_t n, int threads, const Work& work) {
    std::atomic<std::size_t> next{0};
    std::exception_ptr failure;
    std::mutex guard;
    const auto loop = [&] {
        try {
            for (std::size_t i; (i = next.fetch_add(1)) < n;) work(i);
        } catch (...) {
            const std::lock_guard lock(guard);
            if (!failure) failure = std::current_exception();
            next = n;
        }
    };
    {
        std::vector<std::jthread> pool;
        const std::size_t workers = std::min(static_cast<std::size_t>(threads), n);
        for (std::size_t t = 1; t < workers; ++t) pool.emplace_back(loop);
        loop();
    }
    if (failure) std::rethrow_exception(failure);
}

// The number of rows when blank lines at the end of the text do not count.
std::int64_t rows_without_blank_tail(const char* begin, const char* end, std::int64_t lines) {
    const char* p = end;
    if (p > begin && p[-1] == '\n') --p;
    for (; p > begin && is_space(p[-1], ' '); --p) lines -= p[-1] == '\n';
    return p == begin ? 0 : lines;
}

template <class Index>
void reserve(Matrix<Index>& matrix, std::int64_t rows, std::int64_t entries) {
    matrix.indptr =
        std::make_unique_for_overwrite<std::int64_t[]>(static_cast<std::size_t>(rows) + 1);
    matrix.indices = std::make_unique_for_overwrite<Index[]>(static_cast<std::size_t>(entries));
    matrix.data = std::make_unique_for_overwrite<float[]>(static_cast<std::size_t>(entries));
}

// A view of the shared arrays from where this chunk's entries go; released, never freed.
template <class Index>
class Slice {
   public:
    Slice(Matrix<Index>& whole, std::int64_t offset) {
        if (!whole.indices) return;
        view.indices.reset(whole.indices.get() + offset);
        view.data.reset(whole.data.get() + offset);
    }
    Slice(const Slice&) = delete;
    Slice& operator=(const Slice&) = delete;
    ~Slice() {
        (void)view.indices.release();
        (void)view.data.release();
    }
    Matrix<Index> view;
};

template <class Index>
void parse_chunk(Chunk& chunk, Parsed<Index>& out, const Options& options) {
    Slice<Index> features(out.features, chunk.feature_offset),
        labels(out.labels, chunk.label_offset);
    RowParser<Index> parser(options);
    std::int64_t row = chunk.first_row;
    for (const char* p = chunk.begin; p < chunk.end && row < out.rows; ++row) {
        const void* newline = std::memchr(p, '\n', static_cast<std::size_t>(chunk.end - p));
        const char* stop = newline != nullptr ? static_cast<const char*>(newline) : chunk.end;
        if (!parser.parse(p, stop, features.view, labels.view)) {
            chunk.problem = {parser.fault, row, parser.token};
            return;
        }
        out.features.indptr[row + 1] = features.view.size;  // counted from the chunk's start;
                                                            // close_gaps makes it whole
        if (options.bow) out.labels.indptr[row + 1] = labels.view.size;
        p = stop + 1;
    }
    chunk.features = features.view.size;
    chunk.labels = labels.view.size;
}

// Moves the chunks' entries together and makes the row pointers absolute.
template <class Index>
void close_gaps(Matrix<Index>& matrix, const std::vector<Chunk>& chunks, std::int64_t rows,
                std::int64_t Chunk::* offset, std::int64_t Chunk::* size) {
    matrix.indptr[0] = 0;
    for (std::size_t c = 0; c < chunks.size(); ++c) {
        const Chunk& chunk = chunks[c];
        const std::int64_t from = chunk.*offset, n = chunk.*size, to = matrix.size;
        if (from != to && n > 0) {
            std::memmove(&matrix.indices[to], &matrix.indices[from],
                         static_cast<std::size_t>(n) * sizeof(Index));
            std::memmove(&matrix.data[to], &matrix.data[from],
                         static_cast<std::size_t>(n) * sizeof(float));
        }
        const std::int64_t last =
            c + 1 < chunks.size() ? std::min(chunks[c + 1].first_row, rows) : rows;
        for (std::int64_t row = chunk.first_row; row < last; ++row) matrix.indptr[row + 1] += to;
        matrix.size += n;
    }
}

}  // namespace

template <class Index>
Parsed<Index> parse_sparse(const char* begin, const char* end, const Options& options) {
    Parsed<Index> out;
    std::vector<Chunk> chunks = split(begin, end, options.threads);
    parallel_for(chunks.size(), options.threads, [&](std::size_t c) {
        chunks[c].counts = count(chunks[c].begin, chunks[c].end, options.comma);
    });
    std::int64_t lines = 0, features = 0, labels = 0;
    for (Chunk& chunk : chunks) {
        chunk.first_row = lines, chunk.feature_offset = features, chunk.label_offset = labels;
        lines += chunk.counts.lines;
        features += options.bare ? chunk.counts.tokens : chunk.counts.colons;
        labels += chunk.counts.commas + chunk.counts.lines;
    }
    out.rows = options.rows >= 0 ? options.rows : lines;
    // More lines than rows are allowed only where the surplus is blank.
    const std::int64_t found =
        lines > out.rows ? rows_without_blank_tail(begin, end, lines) : lines;
    if (lines < out.rows || found > out.rows) {
        out.problem = {Fault::rows, found, {}};
        return out;
    }
    reserve(out.features, out.rows, features);
    if (options.bow) reserve(out.labels, out.rows, labels);

    // Chunks behind a failed one are skipped, those before it never: the problem told is the first
    // in the text.
    std::atomic<std::size_t> failed{chunks.size()};
    parallel_for(chunks.size(), options.threads, [&](std::size_t c) {
        if (c > failed) return;
        parse_chunk(chunks[c], out, options);
        if (chunks[c].problem.fault == Fault::none) return;
        for (std::size_t seen = failed; c < seen && !failed.compare_exchange_weak(seen, c);) {}
    });
    for (const Chunk& chunk : chunks) {
        if (chunk.problem.fault == Fault::none) continue;
        out.problem = chunk.problem;
        return out;
    }
    close_gaps(out.features, chunks, out.rows, &Chunk::feature_offset, &Chunk::features);
    if (options.bow) close_gaps(out.labels, chunks, out.rows, &Chunk::label_offset, &Chunk::labels);
    return out;
}

template Parsed<std::int32_t> parse_sparse(const char*, const char*, const Options&);
template Parsed<std::int64_t> parse_sparse(const char*, const char*, const Options&);

}  // namespace xmlkernels::host
