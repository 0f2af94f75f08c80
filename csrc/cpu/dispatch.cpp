// Entry points: choose the kernels built for the widest instruction set that this CPU has.
#include "params.h"

#define DECLARE_ISA(isa)                                    \
    namespace lite_attention::isa {                         \
    void decode(const DecodeParams& p);                     \
    void summarize(const SummarizeParams& p);               \
    }

#if defined(__x86_64__)
DECLARE_ISA(v3)
DECLARE_ISA(v4)
#else
DECLARE_ISA(generic)
#endif

namespace {

#if defined(__x86_64__)
bool has_v3() { return __builtin_cpu_supports("x86-64-v3"); }
bool has_v4() { return __builtin_cpu_supports("x86-64-v4"); }
#endif

}  // namespace

extern "C" {

// Name of the instruction set in use; empty when this CPU has none that the kernels were built for.
const char* lite_attention_isa() {
#if defined(__x86_64__)
    return has_v4() ? "x86-64-v4" : has_v3() ? "x86-64-v3" : "";
#else
    return "generic";
#endif
}

int32_t lite_attention_decode_block() { return lite_attention::kBlock; }

void lite_attention_decode(const lite_attention::DecodeParams* p) {
#if defined(__x86_64__)
    has_v4() ? lite_attention::v4::decode(*p) : lite_attention::v3::decode(*p);
#else
    lite_attention::generic::decode(*p);
#endif
}

void lite_attention_summarize(const lite_attention::SummarizeParams* p) {
#if defined(__x86_64__)
    has_v4() ? lite_attention::v4::summarize(*p) : lite_attention::v3::summarize(*p);
#else
    lite_attention::generic::summarize(*p);
#endif
}

}  // extern "C"
