// What the sanitizers and libFuzzer are given: one call of the parser of sparse text, whose result
// must be canonical and the same for any number of threads and either width of index.
#include "sparse_text.h"

#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>

using namespace xmlkernels::host;

namespace {

void must(bool true_, const char* told) {
    if (true_) return;
    std::fprintf(stderr, "wrong: %s\n", told);
    std::abort();
}

template <class Index>
void check(const Matrix<Index>& matrix, std::int64_t rows, std::int64_t cols) {
    must(matrix.indptr[0] == 0 && matrix.indptr[rows] == matrix.size, "ends of indptr");
    for (std::int64_t row = 0; row < rows; ++row) {
        must(matrix.indptr[row] <= matrix.indptr[row + 1], "indptr falls");
        for (std::int64_t i = matrix.indptr[row]; i < matrix.indptr[row + 1]; ++i) {
            must(matrix.indices[i] >= 0 && (cols < 0 || matrix.indices[i] < cols), "index");
            must(i == matrix.indptr[row] || matrix.indices[i - 1] < matrix.indices[i], "order");
            must(std::isfinite(matrix.data[i]) && matrix.data[i] != 0.0f, "value");
        }
    }
}

template <class A, class B>
void same(const Matrix<A>& a, const Matrix<B>& b, std::int64_t rows) {
    must(a.size == b.size, "another number of entries");
    must(std::memcmp(a.indptr.get(), b.indptr.get(),
                     static_cast<std::size_t>(rows + 1) * sizeof(std::int64_t)) == 0,
         "other rows");
    for (std::int64_t i = 0; i < a.size; ++i) {
        must(static_cast<std::int64_t>(a.indices[i]) == static_cast<std::int64_t>(b.indices[i]),
             "another index");
        must(a.data[i] == b.data[i], "another value");
    }
}

template <class A, class B>
void same(const Parsed<A>& a, const Parsed<B>& b, bool bow) {
    must(a.problem.fault == b.problem.fault && a.problem.row == b.problem.row &&
             a.problem.token == b.problem.token,
         "another problem");
    if (a.problem.fault != Fault::none) return;
    must(a.rows == b.rows, "another number of rows");
    same(a.features, b.features, a.rows);
    if (bow) same(a.labels, b.labels, a.rows);
}

}  // namespace

// The first four bytes are the options, the rest is the text.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    constexpr std::size_t kHead = 4;
    if (size < kHead) return 0;
    constexpr std::int64_t kLimits[] = {9, 300, (std::int64_t{1} << 31) - 1, 1};
    Options options;
    options.bow = data[0] & 1;
    options.bare = data[0] & 2;
    options.comma = data[0] & 4;
    options.duplicates = static_cast<Duplicates>((data[0] >> 3) & 3);
    options.cols = kLimits[(data[0] >> 5) & 3];
    options.labels = kLimits[data[1] & 3];
    const bool whole = data[1] & 4;
    options.rows = data[1] & 8 ? data[2] : -1;
    // Chunks have 64 KiB or more: some texts are repeated until there are a few.
    const std::size_t times = data[3] == 7 ? (std::size_t{160} << 10) / size + 1 : 1;
    std::string text;
    for (std::size_t i = 0; i < times; ++i)
        text.append(reinterpret_cast<const char*>(data) + kHead, size - kHead);
    // A copy of just this size: a read beyond it is seen.
    const std::unique_ptr<char[]> exact(new char[text.size()]);
    std::memcpy(exact.get(), text.data(), text.size());
    const char *begin = exact.get(), *end = begin + text.size();

    const Parsed<std::int32_t> one = parse_sparse<std::int32_t>(begin, end, options);
    if (one.problem.fault == Fault::none) {
        check(one.features, one.rows, options.cols);
        if (options.bow) check(one.labels, one.rows, options.labels);
    } else {
        must(one.problem.token.size() <= kTokenLimit, "a long token");
    }
    options.threads = 3;
    same(one, parse_sparse<std::int64_t>(begin, end, options), options.bow);
    if (whole) {  // any index that an int64 holds
        options.cols = options.labels = -1;
        const Parsed<std::int64_t> wide = parse_sparse<std::int64_t>(begin, end, options);
        if (wide.problem.fault == Fault::none) check(wide.features, wide.rows, -1);
    }
    return 0;
}
