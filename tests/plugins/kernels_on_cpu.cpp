// kernels.cu, at the path KERNELS, for the machine of cuda_on_cpu.cpp. Compiled with the constants that it wants.

#include "cuda_on_cpu.h"

#include KERNELS

namespace {

template <typename Type>
Type taken(void**& parameters) {
  return *static_cast<Type*>(*parameters++);
}

template <typename... Parameters>
void call(void (*kernel)(Parameters...), void** parameters) {
  // Braces, because only in them are arguments evaluated from left to right.
  struct Call {
    Call(void (*body)(Parameters...), Parameters... given) { body(given...); }
  };
  Call{kernel, taken<Parameters>(parameters)...};
}

}  // namespace

#define SHIM_TEXT_OF(name) #name
#define SHIM_TEXT(name) SHIM_TEXT_OF(name)

const shim::Entry shim::entries[] = {
    {SHIM_TEXT(SVCLI_ENTRY(token_gather)), [](void** given) { call(SVCLI_ENTRY(token_gather), given); },
     kGatherThreads},
    {SHIM_TEXT(SVCLI_ENTRY(summary_partial)), [](void** given) { call(SVCLI_ENTRY(summary_partial), given); },
     kPartialThreads},
    {SHIM_TEXT(SVCLI_ENTRY(summary_merge)), [](void** given) { call(SVCLI_ENTRY(summary_merge), given); },
     kMergeThreads},
    {nullptr, nullptr, 0},
};
