// The pybind11 module xmlkernels._host. Sees no torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <utility>

#include "carry.h"
#include "sparse_text.h"

namespace py = pybind11;
using namespace xmlkernels::host;

namespace {

template <class T>
py::array_t<T> hand_over(std::unique_ptr<T[]> values, std::int64_t size) {
    T* pointer = values.get();
    py::capsule owner(pointer, [](void* p) { delete[] static_cast<T*>(p); });
    (void)values.release();
    return py::array_t<T>({size}, {static_cast<std::int64_t>(sizeof(T))}, pointer, owner);
}

template <class Index>
py::tuple hand_over(Matrix<Index>& matrix, std::int64_t rows) {
    return py::make_tuple(hand_over(std::move(matrix.indptr), rows + 1),
                          hand_over(std::move(matrix.indices), matrix.size),
                          hand_over(std::move(matrix.data), matrix.size));
}

const char* name(Fault fault) {
    switch (fault) {
        case Fault::none: return "none";
        case Fault::rows: return "rows";
        case Fault::index: return "index";
        case Fault::index_range: return "index_range";
        case Fault::missing_value: return "missing_value";
        case Fault::value: return "value";
        case Fault::duplicate: return "duplicate";
        case Fault::label: return "label";
        case Fault::label_range: return "label_range";
        case Fault::label_duplicate: return "label_duplicate";
    }
    return "none";
}

Duplicates duplicates_of(const std::string& text) {
    if (text == "error") return Duplicates::error;
    if (text == "sum") return Duplicates::sum;
    if (text == "max") return Duplicates::max;
    if (text == "first") return Duplicates::first;
    throw std::invalid_argument("duplicates: expected error, sum, max or first, got " + text);
}

template <class Index>
py::tuple run(const char* begin, const char* end, const Options& options) {
    Parsed<Index> parsed;
    {
        const py::gil_scoped_release release;
        parsed = parse_sparse<Index>(begin, end, options);
    }
    const Problem& problem = parsed.problem;
    if (problem.fault != Fault::none) {
        return py::make_tuple(py::tuple(), py::make_tuple(name(problem.fault), problem.row,
                                                          py::bytes(problem.token)));
    }
    py::list matrices;
    matrices.append(hand_over(parsed.features, parsed.rows));
    if (options.bow) matrices.append(hand_over(parsed.labels, parsed.rows));
    return py::make_tuple(py::tuple(matrices), py::none());
}

py::tuple parse(const py::buffer& buffer, std::int64_t start, std::int64_t rows, std::int64_t cols,
                std::int64_t labels, bool bow, bool bare, bool comma, const std::string& duplicates,
                int threads) {
    const py::buffer_info view = buffer.request();
    if (view.ndim != 1 || view.itemsize != 1 || (view.size > 1 && view.strides[0] != 1)) {
        throw std::invalid_argument("buffer: expected contiguous bytes");
    }
    if (start < 0 || start > view.size) throw std::invalid_argument("start: beyond the buffer");
    if (threads < 1) throw std::invalid_argument("threads: expected at least 1");
    const Options options{rows, cols, labels, bow, bare, comma, duplicates_of(duplicates), threads};
    const char* begin = static_cast<const char*>(view.ptr);
    constexpr std::int64_t narrow = std::int64_t{1} << 31;
    const bool fits = cols >= 0 && cols < narrow && (!bow || (labels >= 0 && labels < narrow));
    return fits ? run<std::int32_t>(begin + start, begin + view.size, options)
                : run<std::int64_t>(begin + start, begin + view.size, options);
}

using Numbers = py::array_t<std::int64_t, py::array::c_style>;

py::object carry_pieces(const Numbers& file, const Numbers& place, const Numbers& address,
                        const Numbers& bytes, bool writes, int threads) {
    const py::ssize_t count = file.size();
    for (const Numbers* each : {&file, &place, &address, &bytes}) {
        if (each->ndim() != 1 || each->size() != count) {
            throw std::invalid_argument("pieces: expected four arrays of one length");
        }
    }
    for (py::ssize_t i = 0; i < count; ++i) {
        if (place.at(i) % kPage != 0 || address.at(i) % kPage != 0) {
            throw std::invalid_argument("pieces: expected whole pages of file and memory");
        }
    }
    if (threads < 1) throw std::invalid_argument("threads: expected at least 1");
    const Pieces pieces{count, file.data(), place.data(), address.data(), bytes.data()};
    Failed failed;
    {
        const py::gil_scoped_release release;
        failed = carry(pieces, writes, threads);
    }
    if (failed.piece < 0) return py::none();
    return py::make_tuple(failed.piece, failed.error);
}

}  // namespace

PYBIND11_MODULE(_host, module) {
    module.doc() = "Native readers of text files, and of rows in files.";
    module.def("parse_sparse", &parse, py::arg("buffer"), py::arg("start"), py::arg("rows"),
               py::arg("cols"), py::arg("labels"), py::arg("bow"), py::arg("bare"),
               py::arg("comma"), py::arg("duplicates"), py::arg("threads"),
               "Parse rows of sparse text from bytes.\n\n"
               "Returns (matrices, None), each matrix (indptr int64 [rows + 1], indices, data "
               "float32), or\n"
               "((), (fault, row, token)) for the first thing that is wrong.");
    module.def("carry", &carry_pieces, py::arg("file"), py::arg("place"), py::arg("address"),
               py::arg("bytes"), py::arg("writes"), py::arg("threads"),
               "Read or write pieces of files, several at once, each of whole pages.\n\n"
               "Descriptors, first bytes in file and memory, and bytes that are needed are int64 "
               "[n].\n\nReturns None, or (piece, errno) of one that was not carried; 0 where its "
               "file ended.");
}
