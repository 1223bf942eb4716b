// The Python module difffit_fast._C. Importing it registers the operations (STABLE_TORCH_LIBRARY in the other files);
// the module itself only tells how it was built and which instruction set its kernels use on this machine.

// The pybind11 that PyTorch 2.10 brings refuses to be included beside the stable ABI's switches. This file calls nothing of
// libtorch, so it can do without them.
#undef TORCH_STABLE_ONLY
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#include <torch/headeronly/version.h>

#include <string>

#include "isa.h"

namespace {

std::string compiler() {
#if defined(__clang__)
  return std::string("clang ") + __VERSION__;
#elif defined(__GNUC__)
  return std::string("g++ ") + __VERSION__;
#else
  return "unknown";
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of difffit_fast: torch.ops.difffit_fast_cpp.*";
  m.def("cpu_capability", &difffit::isa_name, "Instruction set of the kernels on this processor.");
  m.def("cpu_is_amd", &difffit::amd, "Whether this is a processor of AMD.");
  m.def("build_info", [] {
    pybind11::dict info;
    info["compiler"] = compiler();
    info["torch"] = TORCH_VERSION;
    return info;
  });
}
