// The interface between the runtime and whoever launches: Python through ctypes, or replay.cpp under a
// sanitizer.
#pragma once
#include <cstdint>

extern "C" {

struct EmuLaunch {
    uint32_t grid[3], block[3];
    uint32_t dynamic_smem;
    uint64_t seed;              // 0: threads and blocks in order; else shuffled, with switches at atomics
    double timeout;             // seconds
    uint32_t cooperative;       // all blocks at once, one at a time otherwise
    uint32_t split_masks;       // activemask splits converged lanes at random
    uint32_t duplicate_stores;  // threads may store one value to one shared word by one statement
    uint32_t first_apart,
        last_apart;  // for TSan: threads of as many blocks, of those that run first and last, are
                     // told apart, and every other block is one thread; both 0: all are
};

struct EmuFault {
    char kind[32];
    uint32_t line;  // in the PTX; 0: none
    uint32_t block[3], thread[3];
    char text[2048];
};

// A buffer that kernels may touch; every other address is out of bounds.
void emu_add_buffer(uint64_t address, uint64_t size, const char* name);
void emu_clear_buffers();
uint64_t emu_variable(const char* name,
                      uint64_t* size);  // address of a .global or .const variable, 0 if there is none

// Runs a kernel: 0, or 1 with `fault` filled. `params` are the bytes of its parameters as PTX lays them out.
int emu_launch(const char* kernel, const EmuLaunch* launch, const uint8_t* params, uint32_t param_bytes,
               EmuFault* fault);
}
