// Runs a fuzz target without a fuzzer: on files (AFL's @@, or inputs to reproduce), or on random bytes for a while.
//
//   target FILE...            target --seconds N [SEED]
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace {

void run_random(double seconds, unsigned seed) {
  std::mt19937 random(seed);
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  long num_inputs = 0;
  for (; std::chrono::steady_clock::now() < end; ++num_inputs) {
    std::vector<std::uint8_t> bytes(random() % 2000);
    for (std::uint8_t& byte : bytes) {
      byte = static_cast<std::uint8_t>(random());
    }
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  }
  std::printf("%ld inputs from seed %u\n", num_inputs, seed);
}

void run_file(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    std::fprintf(stderr, "cannot read %s\n", path);
    std::exit(1);
  }
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc >= 3 && std::strcmp(argv[1], "--seconds") == 0) {
    run_random(std::atof(argv[2]), argc > 3 ? static_cast<unsigned>(std::atoi(argv[3])) : 0u);
    return 0;
  }
  for (int index = 1; index < argc; ++index) {
    run_file(argv[index]);
  }
  return argc > 1 ? 0 : 1;
}
