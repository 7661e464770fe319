// Parallel parser of sparse text rows: `index:value index:value`, and of the old bag-of-words rows
// `l1,l2 f:v f:v`. Knows nothing of Python, files or messages: bytes in, CSR arrays or one located
// problem out.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

namespace xmlkernels::host {

enum class Duplicates { error, sum, max, first };

// What is wrong with a token. The sentence told to the user is made in
// xmlkernels/data/formats/sparse_text.py, so that the Python parser tells the same.
enum class Fault {
    none,
    rows,             // the number of rows is not the header's; Problem.row is the number found
    index,            // not `index:value`
    index_range,      // negative or >= cols
    missing_value,    // a bare index where a value is needed
    value,            // not a finite float32 number
    duplicate,        // an index twice in one row
    label,            // bag of words: not a label id
    label_range,      // bag of words: negative or >= labels
    label_duplicate,  // bag of words: a label twice in one row
};

struct Options {
    std::int64_t rows = -1;    // -1: as many as the text has
    std::int64_t cols = -1;    // -1: any index below 2^63 - 1
    std::int64_t labels = -1;  // bag of words only; -1: any
    bool bow = false;          // rows start with comma-separated labels
    bool bare = false;         // `index` alone means `index:1`
    bool comma = false;        // a comma separates tokens as a space does
    Duplicates duplicates = Duplicates::error;
    int threads = 1;
};

struct Problem {
    Fault fault = Fault::none;
    std::int64_t row = 0;  // 0-based
    std::string token;     // shortened to kTokenLimit bytes
};

inline constexpr std::size_t kTokenLimit = 200;

// CSR with sorted, unique indices and no stored zeros. The arrays may be longer than `size`.
template <class Index>
struct Matrix {
    std::unique_ptr<std::int64_t[]> indptr;  // [rows + 1]
    std::unique_ptr<Index[]> indices;        // [size]
    std::unique_ptr<float[]> data;           // [size]
    std::int64_t size = 0;
};

template <class Index>
struct Parsed {
    std::int64_t rows = 0;
    Matrix<Index> features;
    Matrix<Index> labels;  // bag of words only
    Problem problem;       // fault none: the matrices are whole; otherwise they are not filled
};

// Parses the rows in [begin, end); a header is already behind `begin`. Throws std::bad_alloc and
// std::system_error only.
template <class Index>
Parsed<Index> parse_sparse(const char* begin, const char* end, const Options& options);

extern template Parsed<std::int32_t> parse_sparse(const char*, const char*, const Options&);
extern template Parsed<std::int64_t> parse_sparse(const char*, const char*, const Options&);

}  // namespace xmlkernels::host
