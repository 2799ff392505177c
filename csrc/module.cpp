// The Python module snf_ext._C: information about the build, nothing else. Importing it loads the
// library, and with it the operators that the other files register.
#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <algorithm>
#include <string>
#include <thread>
#include <vector>

#include "cpu/cpu_capability.h"

#define SNF_TEXT_OF(text) #text
#define SNF_TEXT(macro) SNF_TEXT_OF(macro)

namespace {

#ifdef SNF_WITH_CUDA
constexpr bool kCuda = true;
constexpr const char* kCudaArchs = SNF_TEXT(SNF_CUDA_ARCHS);
#else
constexpr bool kCuda = false;
constexpr const char* kCudaArchs = "";
#endif

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#elif defined(__GNUC__)
constexpr const char* kCompiler = "gcc " __VERSION__;
#else
constexpr const char* kCompiler = "unknown";
#endif

std::vector<std::string> split(const std::string& text, char separator) {
  std::vector<std::string> parts;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find(separator, begin), text.size());
    parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["version"] = SNF_TEXT(SNF_VERSION);
  info["torch"] = TORCH_VERSION;
  info["cuda"] = kCuda;
  info["cuda_archs"] = split(kCudaArchs, ':');
  info["compiler"] = kCompiler;
  info["cpu_capability"] = snf::cpu_capability();
  return info;
}

// How many threads at::parallel_for runs on as this library was compiled (one without OpenMP).
// Counted by running it, since a missing flag or a second OpenMP runtime shows nowhere else.
size_t parallel_threads() {
  const int64_t chunks = at::get_num_threads();
  std::vector<std::thread::id> seen(chunks);
  at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
    std::fill(seen.begin() + begin, seen.begin() + end, std::this_thread::get_id());
  });
  std::sort(seen.begin(), seen.end());
  return std::unique(seen.begin(), seen.end()) - seen.begin();
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.doc() = "What this build of snf_ext is; importing it registers the operators.";
  module.def(
      "build_info", &build_info, "Versions, compiler, CUDA and instruction set of the build.");
  module.def("parallel_threads", &parallel_threads, "Threads that at::parallel_for runs on here.");
}
