/* A CUDA program as any: y = a x + y through the driver API. It knows nothing of the device that it runs on.
 * Built with -DLINKED it is linked with the driver, as with CUDA's stub library; else it loads libcuda.so.1 itself. */
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>

typedef int CUresult;
typedef int CUdevice;
typedef unsigned long long CUdeviceptr;
typedef struct CUctx_st *CUcontext;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUstream_st *CUstream;

#ifdef LINKED
#define API(name, ...) extern CUresult name(__VA_ARGS__);
#else
#include <dlfcn.h>
#define API(name, ...) static CUresult (*name)(__VA_ARGS__);
#endif
#define CALLS \
    API(cuInit, unsigned) \
    API(cuDeviceGet, CUdevice *, int) \
    API(cuDeviceGetName, char *, int, CUdevice) \
    API(cuCtxCreate_v2, CUcontext *, unsigned, CUdevice) \
    API(cuCtxDestroy_v2, CUcontext) \
    API(cuModuleLoadData, CUmodule *, const void *) \
    API(cuModuleGetFunction, CUfunction *, CUmodule, const char *) \
    API(cuMemAlloc_v2, CUdeviceptr *, size_t) \
    API(cuMemFree_v2, CUdeviceptr) \
    API(cuMemcpyHtoD_v2, CUdeviceptr, const void *, size_t) \
    API(cuMemcpyDtoH_v2, void *, CUdeviceptr, size_t) \
    API(cuLaunchKernel, CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, \
        void **, void **)
CALLS

static const char PTX[] =
    ".version 7.0\n.target sm_80\n.address_size 64\n"
    ".visible .entry saxpy(.param .f32 a, .param .u64 x, .param .u64 y, .param .u32 n) {\n"
    ".reg .pred %p; .reg .b32 %r<5>; .reg .f32 %f<4>; .reg .b64 %d<6>;\n"
    "mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mov.u32 %r3, %tid.x;\n"
    "mad.lo.s32 %r1, %r1, %r2, %r3; ld.param.u32 %r4, [n];\n"
    "setp.ge.u32 %p, %r1, %r4; @%p ret;\n"
    "ld.param.f32 %f1, [a]; ld.param.u64 %d1, [x]; ld.param.u64 %d2, [y];\n"
    "mul.wide.u32 %d3, %r1, 4; add.s64 %d1, %d1, %d3; add.s64 %d2, %d2, %d3;\n"
    "ld.global.f32 %f2, [%d1]; ld.global.f32 %f3, [%d2];\n"
    "fma.rn.f32 %f3, %f1, %f2, %f3; st.global.f32 [%d2], %f3; ret; }\n";

static void check(CUresult result, const char *call) {
    if (result != 0) {
        printf("%s returned %d\n", call, result);
        exit(2);
    }
}
#define CHECK(call) check(call, #call)

enum { N = 1000 };

int main(int argc, char **argv) {
#ifndef LINKED
    void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    if (!driver) {
        printf("%s\n", dlerror());
        return 3;
    }
#undef API
#define API(name, ...) \
    if (!(name = (CUresult(*)(__VA_ARGS__))dlsym(driver, #name))) { printf("no " #name "\n"); return 4; }
    CALLS
#endif
    static float x[N], y[N];
    for (int i = 0; i < N; i++) x[i] = i, y[i] = 1000 - i;
    CUdevice device;
    CUcontext context;
    CUmodule module;
    CUfunction saxpy;
    CUdeviceptr dx, dy;
    char name[100];
    CHECK(cuInit(0));
    CHECK(cuDeviceGet(&device, 0));
    CHECK(cuDeviceGetName(name, sizeof name, device));
    CHECK(cuCtxCreate_v2(&context, 0, device));
    CHECK(cuModuleLoadData(&module, PTX));
    CHECK(cuModuleGetFunction(&saxpy, module, "saxpy"));
    CHECK(cuMemAlloc_v2(&dx, sizeof x));
    CHECK(cuMemAlloc_v2(&dy, sizeof y));
    CHECK(cuMemcpyHtoD_v2(dx, x, sizeof x));
    CHECK(cuMemcpyHtoD_v2(dy, y, sizeof y));
    float a = 3;
    unsigned n = N;
    void *arguments[] = {&a, &dx, &dy, &n};
    CHECK(cuLaunchKernel(saxpy, (N + 127) / 128, 1, 1, 128, 1, 1, 0, 0, arguments, 0));
    CHECK(cuMemcpyDtoH_v2(y, dy, sizeof y));
    for (int i = 0; i < N; i++)
        if (y[i] != 3.0f * i + 1000 - i) {
            printf("y[%d] is %g\n", i, y[i]);
            return 5;
        }
    CHECK(cuMemFree_v2(dx));
    CHECK(cuMemFree_v2(dy));
    CHECK(cuCtxDestroy_v2(context));
    printf("saxpy on %s\n", name);
    /* The code that the program is asked to end with. */
    return argc > 1 ? atoi(argv[1]) : 0;
}
