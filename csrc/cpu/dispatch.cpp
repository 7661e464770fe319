// The one place that chooses an instruction set: the widest this processor and its operating system
// serve. XMLKERNELS_CPU=<name> asks for another of those listed by `Kernels::name`, so that all can
// be tested on one machine.
//
// The build defines XK_HAS_ISA_<level> for each level that the kernels are compiled for (see
// common.h).
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../kernels.h"

#define XK_FUNCTION(ns, kernel, Args) void kernel(const Args&, const Host&);
#define XK_POINTER(ns, kernel, Args) void (*kernel)(const Args&, const Host&);
#define XK_ADDRESS(ns, kernel, Args) &ns::kernel,
namespace xk::isa0 {
XK_EACH_KERNEL(XK_FUNCTION, isa0)
}
namespace xk::isa1 {
XK_EACH_KERNEL(XK_FUNCTION, isa1)
}
namespace xk::isa2 {
XK_EACH_KERNEL(XK_FUNCTION, isa2)
}
namespace xk::isa3 {
XK_EACH_KERNEL(XK_FUNCTION, isa3)
}

namespace xk {
namespace {

struct Kernels {
  const char* name;
  bool usable;
  XK_EACH_KERNEL(XK_POINTER, -)
};
#define XK_KERNELS(name, usable, ns) \
  Kernels { name, usable, XK_EACH_KERNEL(XK_ADDRESS, ns) }

Kernels choose() {
#if defined(XK_HAS_ISA_1) || defined(XK_HAS_ISA_2) || defined(XK_HAS_ISA_3)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2");
  [[maybe_unused]] const bool avx512 =
      avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  const Kernels all[] = {
#ifdef XK_HAS_ISA_2
      XK_KERNELS("avx512_bf16", avx512 && __builtin_cpu_supports("avx512bf16"), isa2),
#endif
#ifdef XK_HAS_ISA_3
      XK_KERNELS("avx512", avx512, isa3),
#endif
#ifdef XK_HAS_ISA_1
      XK_KERNELS("avx2", avx2, isa1),
#endif
      XK_KERNELS("portable", true, isa0),
  };
  const char* wanted = std::getenv("XMLKERNELS_CPU");
  std::string names;
  for (const Kernels& k : all) {
    if (k.usable && (!wanted || !*wanted || !std::strcmp(wanted, k.name))) return k;
    if (k.usable) names += names.empty() ? k.name : std::string(" or ") + k.name;
  }
  throw std::runtime_error("environment variable XMLKERNELS_CPU: expected " + names +
                           " on this processor, got '" + wanted + "'; unset it to use the fastest");
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace

#define XK_CALL(ns, kernel, Args) \
  void kernel(const Args& args, const Host& host) { kernels().kernel(args, host); }
XK_EACH_KERNEL(XK_CALL, -)
const char* instruction_set() { return kernels().name; }

}  // namespace xk
