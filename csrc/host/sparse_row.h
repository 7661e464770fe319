// One row of sparse text: tokens, numbers, order and duplicates.
#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "sparse_text.h"

namespace xmlkernels::host {

using Stops = std::array<bool, 256>;

// The characters that end a token: ASCII white space, `#`, and a comma where asked.
inline Stops make_stops(bool comma) {
    Stops stops{};
    for (const char c : {' ', '\t', '\n', '\v', '\f', '\r', '#'})
        stops[static_cast<unsigned char>(c)] = true;
    stops[static_cast<unsigned char>(',')] = comma;
    return stops;
}

inline bool is_digit(char c) { return static_cast<unsigned char>(c - '0') < 10; }

// Whether a number that std::from_chars calls out of range is too small (0 then) rather than too
// large.
inline bool underflows(const char* p, const char* q) {
    std::int64_t magnitude = 0;  // decimal exponent of the first significant digit
    bool point = false, significant = false;
    for (; p < q && *p != 'e' && *p != 'E'; ++p) {
        if (*p == '.') point = true;
        if (!is_digit(*p)) continue;
        significant = significant || *p != '0';
        if (significant && !point) ++magnitude;
        if (!significant && point) --magnitude;
    }
    std::int64_t exponent = 0;
    if (p < q) {
        const bool negative = p + 1 < q && p[1] == '-';
        p += (p + 1 < q && (p[1] == '-' || p[1] == '+')) ? 2 : 1;
        for (; p < q; ++p)
            exponent = std::min<std::int64_t>(exponent * 10 + (*p - '0'), std::int64_t{1} << 40);
        if (negative) exponent = -exponent;
    }
    return magnitude + exponent < 0;
}

// The whole of [p, q) as a decimal number. Rounds to double first, as Python's float does, so both
// parsers agree.
inline bool parse_any_value(const char* p, const char* q, float& out) {
    if (p < q && *p == '+') {
        ++p;
        if (p < q && *p == '-') return false;
    }
    double value = 0;
    const auto [rest, error] = std::from_chars(p, q, value);
    if (rest != q || p == q || error == std::errc::invalid_argument) return false;
    if (error == std::errc::result_out_of_range) {
        if (!underflows(p, q)) return false;
        value = 0;
    }
    out = static_cast<float>(value);
    return std::isfinite(out);
}

// Plain decimals of at most 15 digits are exact in double, and so is the power of ten: one division
// rounds correctly. Returns the end of the number, or nullptr where the slow path must decide.
inline const char* parse_plain_value(const char* p, const char* end, const Stops& stops,
                                     float& out) {
    static constexpr double kPowers[] = {1e0, 1e1, 1e2,  1e3,  1e4,  1e5,  1e6,  1e7,
                                         1e8, 1e9, 1e10, 1e11, 1e12, 1e13, 1e14, 1e15};
    const bool negative = p < end && *p == '-';
    p += negative;
    std::uint64_t mantissa = 0;
    const char* start = p;
    for (; p < end && is_digit(*p); ++p)
        mantissa = mantissa * 10 + static_cast<std::uint64_t>(*p - '0');
    std::int64_t digits = p - start, fraction = 0;
    if (p < end && *p == '.') {
        start = ++p;
        for (; p < end && is_digit(*p); ++p)
            mantissa = mantissa * 10 + static_cast<std::uint64_t>(*p - '0');
        fraction = p - start;
        digits += fraction;
    }
    if (digits == 0 || digits > 15 || (p < end && !stops[static_cast<unsigned char>(*p)]))
        return nullptr;
    double value = static_cast<double>(mantissa);
    if (fraction > 0) value /= kPowers[fraction];
    out = static_cast<float>(negative ? -value : value);
    return p;
}

template <class Index>
class RowParser {
   public:
    RowParser(const Options& options) : options_(options), stops_(make_stops(options.comma)) {
        constexpr auto most = std::numeric_limits<std::int64_t>::max();
        col_limit_ = options.cols >= 0 ? options.cols : most;
        label_limit_ = options.labels >= 0 ? options.labels : most;
    }

    // Reads the row [p, end) to the ends of `features` and `labels`; false where `fault` and
    // `token` tell why not.
    bool parse(const char* p, const char* end, Matrix<Index>& features, Matrix<Index>& labels) {
        if (options_.bow && p < end && !stops_[static_cast<unsigned char>(*p)]) {
            const char* stop = token_end(p, end);
            if (std::memchr(p, ':', static_cast<std::size_t>(stop - p)) == nullptr) {
                if (!parse_labels(p, stop, labels)) return false;
                p = stop;
            }
        }
        return parse_features(p, end, features);
    }

    Fault fault = Fault::none;
    std::string token;

   private:
    const char* token_end(const char* p, const char* end) const {
        while (p < end && !stops_[static_cast<unsigned char>(*p)]) ++p;
        return p;
    }

    bool fail(Fault why, const char* p, const char* q) {
        fault = why;
        token.assign(p, std::min(static_cast<std::size_t>(q - p), kTokenLimit));
        return false;
    }

    // Digits of an index; saturates, so that an index too long to hold is out of range and not
    // another index.
    static const char* parse_index(const char* p, const char* end, std::int64_t& out) {
        constexpr std::int64_t most = std::numeric_limits<std::int64_t>::max();
        std::int64_t value = 0;
        const char* start = p;
        for (; p < end && is_digit(*p); ++p) {
            const std::int64_t digit = *p - '0';
            value = (p - start < 18 || value <= (most - digit) / 10) ? value * 10 + digit : most;
        }
        out = value;
        return p;
    }

    static bool is_negative(const char* p, const char* q) {
        if (p + 1 >= q || *p != '-') return false;
        ++p;
        while (p < q && is_digit(*p)) ++p;
        return p == q || (*p == ':' && is_digit(p[-1]));
    }

    bool parse_labels(const char* p, const char* stop, Matrix<Index>& labels) {
        const std::int64_t begin = labels.size;
        std::int64_t previous = -1, label = 0;
        bool ordered = true;
        for (;; ++p) {
            const void* comma = std::memchr(p, ',', static_cast<std::size_t>(stop - p));
            const char* piece_end = comma != nullptr ? static_cast<const char*>(comma) : stop;
            if (is_negative(p, piece_end)) return fail(Fault::label_range, p, piece_end);
            if (p == piece_end || parse_index(p, piece_end, label) != piece_end)
                return fail(Fault::label, p, piece_end);
            if (label >= label_limit_) return fail(Fault::label_range, p, piece_end);
            ordered = ordered && label > previous;
            previous = label;
            labels.indices[labels.size] = static_cast<Index>(label);
            labels.data[labels.size++] = 1.0f;
            p = piece_end;
            if (p == stop) break;
        }
        return ordered || mend_row(labels, begin, Fault::label_duplicate);
    }

    bool parse_features(const char* p, const char* end, Matrix<Index>& out) {
        const std::int64_t begin = out.size;
        std::int64_t previous = -1, index = 0;
        bool canonical = true;
        for (bool first = true;; first = false) {
            while (p < end && stops_[static_cast<unsigned char>(*p)] && *p != '#') ++p;
            if (p == end || *p == '#') break;
            if (first && end - p > 4 && std::memcmp(p, "qid:", 4) == 0) {
                const char* stop = token_end(p, end);
                if (stop == p + 4 || parse_index(p + 4, stop, index) != stop)
                    return fail(Fault::index, p, stop);
                p = stop;
                continue;
            }
            const char* token_begin = p;
            float value = 1.0f;
            p = parse_token(p, end, index, value);
            if (p == nullptr) return fail(fault, token_begin, token_end(token_begin, end));
            canonical = canonical && index > previous && value != 0.0f;
            previous = index;
            out.indices[out.size] = static_cast<Index>(index);
            out.data[out.size++] = value;
        }
        return canonical || mend_row(out, begin, Fault::duplicate);
    }

    // `index:value` or `index`; nullptr with `fault` set where it is neither.
    const char* parse_token(const char* p, const char* end, std::int64_t& index, float& value) {
        const char* after = parse_index(p, end, index);
        const bool bare = after == end || stops_[static_cast<unsigned char>(*after)];
        if (after == p || (!bare && *after != ':')) {
            fault = is_negative(p, token_end(p, end)) ? Fault::index_range : Fault::index;
            return nullptr;
        }
        if (index >= col_limit_) {
            fault = Fault::index_range;
            return nullptr;
        }
        if (bare) {
            fault = Fault::missing_value;
            return options_.bare ? after : nullptr;
        }
        const char* stop = parse_plain_value(after + 1, end, stops_, value);
        if (stop != nullptr) return stop;
        stop = token_end(after, end);
        fault = Fault::value;
        return parse_any_value(after + 1, stop, value) ? stop : nullptr;
    }

    // Sorts the row that starts at `begin`, merges duplicates as the options say and drops zeros.
    bool mend_row(Matrix<Index>& out, std::int64_t begin, Fault duplicate) {
        scratch_.clear();
        for (std::int64_t i = begin; i < out.size; ++i)
            scratch_.emplace_back(out.indices[i], out.data[i]);
        std::stable_sort(scratch_.begin(), scratch_.end(),
                         [](auto& a, auto& b) { return a.first < b.first; });
        out.size = begin;
        for (std::size_t i = 0; i < scratch_.size();) {
            const Index index = scratch_[i].first;
            const std::size_t start = i;
            double value = scratch_[i++].second;
            for (; i < scratch_.size() && scratch_[i].first == index; ++i) {
                if (options_.duplicates == Duplicates::sum) value += scratch_[i].second;
                if (options_.duplicates == Duplicates::max)
                    value = std::max<double>(value, scratch_[i].second);
            }
            const bool repeated = i > start + 1;
            const float rounded = static_cast<float>(value);
            if ((repeated && options_.duplicates == Duplicates::error) || !std::isfinite(rounded)) {
                const std::string text = std::to_string(index);
                const bool error = options_.duplicates == Duplicates::error;
                return fail(error ? duplicate : Fault::value, text.data(),
                            text.data() + text.size());
            }
            if (rounded == 0.0f) continue;
            out.indices[out.size] = index;
            out.data[out.size++] = rounded;
        }
        return true;
    }

    const Options& options_;
    const Stops stops_;
    std::int64_t col_limit_, label_limit_;
    std::vector<std::pair<Index, float>> scratch_;
};

}  // namespace xmlkernels::host
