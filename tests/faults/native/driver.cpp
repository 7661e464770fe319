// Stands in for libFuzzer where there is none: mutates a corpus at random, keeps what reaches new
// code (gcc's -fsanitize-coverage=trace-pc), and writes the input that ends it to a file.
//
//   driver -max_total_time=SECONDS -seed=N -artifact_prefix=PATH FOLDER
//   driver FILE          runs one input
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);
extern "C" void __sanitizer_set_death_callback(void (*callback)());

namespace {

using Input = std::vector<std::uint8_t>;
std::array<std::uint8_t, 1 << 16> seen{};
std::size_t reached = 0;
Input current;
std::string prefix = "crash";

// Written by hand-made code only: not built with -fsanitize-coverage itself.
void save_current() {
    std::ofstream file(prefix + "input", std::ios::binary);
    file.write(reinterpret_cast<const char*>(current.data()),
               static_cast<std::streamsize>(current.size()));
    std::fprintf(stderr, "input written to %sinput\n", prefix.c_str());
}

Input read(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
}

const char* const kWords[] = {"1:1", ":",  ",",  "#",     "\n",    " ",      "qid:1 ",
                              "nan", "1e", "e9", "-1:1",  "+",     "0:0",    "9223372036854775808:1",
                              ".",   "\r", "\t", "1,2,3", "5:1e39", "3:1e-99", "0.1234567890123456"};

void mutate(Input& input, const std::vector<Input>& corpus, std::mt19937_64& random) {
    const auto below = [&](std::size_t n) { return static_cast<std::size_t>(random() % n); };
    for (std::size_t times = 1 + below(4); times > 0; --times) {
        const std::size_t at = below(input.size() + 1);
        const auto place = input.begin() + static_cast<std::ptrdiff_t>(at);
        switch (below(7)) {
            case 0:
                if (at < input.size()) input[at] ^= static_cast<std::uint8_t>(1u << below(8));
                break;
            case 1:
                if (at < input.size()) input[at] = static_cast<std::uint8_t>(random());
                break;
            case 2: input.insert(place, static_cast<std::uint8_t>(random())); break;
            case 3: {
                const auto stop = std::min(input.size(), at + 1 + below(8));
                input.erase(place, input.begin() + static_cast<std::ptrdiff_t>(stop));
                break;
            }
            case 4: {
                const char* word = kWords[below(std::size(kWords))];
                input.insert(place, word, word + std::strlen(word));
                break;
            }
            case 5: {
                const Input& other = corpus[below(corpus.size())];
                if (other.empty()) break;
                const std::size_t from = below(other.size());
                const std::size_t count = 1 + below(std::min<std::size_t>(other.size() - from, 32));
                const auto first = other.begin() + static_cast<std::ptrdiff_t>(from);
                input.insert(place, first, first + static_cast<std::ptrdiff_t>(count));
                break;
            }
            default: input.resize(at);
        }
    }
    if (input.size() > 4096) input.resize(4096);
}

}  // namespace

// Called at every edge of the code that is tested.
extern "C" void __sanitizer_cov_trace_pc() {
    const auto pc = reinterpret_cast<std::uintptr_t>(__builtin_return_address(0));
    std::uint8_t& cell = seen[(pc ^ (pc >> 16)) & (seen.size() - 1)];
    reached += cell == 0;
    cell = 1;
}

int main(int count, char** words) {
    double seconds = 5;
    std::uint64_t seed = 0;
    std::vector<Input> corpus;
    bool single = false;
    for (int i = 1; i < count; ++i) {
        const std::string word = words[i];
        const std::string value = word.substr(word.find('=') + 1);
        if (word.rfind("-max_total_time=", 0) == 0) {
            seconds = std::stod(value);
        } else if (word.rfind("-seed=", 0) == 0) {
            seed = std::stoull(value);
        } else if (word.rfind("-artifact_prefix=", 0) == 0) {
            prefix = value;
        } else if (std::filesystem::is_directory(word)) {
            for (const auto& entry : std::filesystem::directory_iterator(word))
                corpus.push_back(read(entry.path()));
        } else {
            corpus.push_back(read(word));
            single = true;
        }
    }
    std::sort(corpus.begin(), corpus.end());
    if (corpus.empty()) corpus.emplace_back();
    __sanitizer_set_death_callback(save_current);
    for (const Input& input : corpus) {
        current = input;
        LLVMFuzzerTestOneInput(current.data(), current.size());
    }
    if (single) return 0;
    std::mt19937_64 random(seed);
    std::uint64_t runs = 0;
    const auto begin = std::chrono::steady_clock::now();
    const std::chrono::duration<double> limit(seconds);
    while (std::chrono::steady_clock::now() - begin < limit) {
        current = corpus[random() % corpus.size()];
        mutate(current, corpus, random);
        const std::size_t before = reached;
        LLVMFuzzerTestOneInput(current.data(), current.size());
        if (reached > before) corpus.push_back(current);
        ++runs;
    }
    std::printf("Done %llu runs, %zu places of code, %zu inputs kept\n",
                static_cast<unsigned long long>(runs), reached, corpus.size());
    return 0;
}
