// A program around a translated kernel, for the sanitizers: reads a launch from a file, runs it, writes the
// buffers back.
//
// The launch is a line of text for each item, then the bytes of the parameters and of the buffers, in order:
//   kernel NAME | grid X Y Z | block X Y Z
//   options DYNAMIC_SMEM SEED TIMEOUT COOPERATIVE SPLIT_MASKS DUPLICATE_STORES FIRST_APART LAST_APART
//   params BYTES
//   buffer BYTES OFFSET NAME         allocated anew at an address that is OFFSET modulo 256
//   pointer HOLDER AT TARGET DELTA   the 8 bytes at AT of buffer HOLDER (-1: the parameters) become TARGET's
//                                    address + DELTA
//   data
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>
#include <vector>

#include "launch.h"

#if defined(EMU_ASAN)
extern "C" void __asan_poison_memory_region(const volatile void* address, size_t size);
#endif

namespace {

struct Buffer {
    size_t size;
    std::string name;
    char* data;
};

char* allocate(size_t size, size_t offset) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 256, offset + size + (size == 0))) std::abort();
#if defined(EMU_ASAN)
    __asan_poison_memory_region(memory, offset);
#endif
    return static_cast<char*>(memory) + offset;
}

}  // namespace

int main(int, char** argv) {
    std::ifstream in(argv[1], std::ios::binary);
    EmuLaunch launch{};
    std::string kernel, line, word;
    std::vector<uint8_t> params;
    std::vector<Buffer> buffers;
    struct Pointer {
        long holder, at, target, delta;
    };
    std::vector<Pointer> pointers;
    while (std::getline(in, line) && line != "data") {
        std::istringstream fields(line);
        fields >> word;
        if (word == "kernel") fields >> kernel;
        if (word == "grid") fields >> launch.grid[0] >> launch.grid[1] >> launch.grid[2];
        if (word == "block") fields >> launch.block[0] >> launch.block[1] >> launch.block[2];
        if (word == "options")
            fields >> launch.dynamic_smem >> launch.seed >> launch.timeout >> launch.cooperative >>
                launch.split_masks >> launch.duplicate_stores >> launch.first_apart >> launch.last_apart;
        if (word == "params") {
            size_t bytes = 0;
            fields >> bytes;
            params.resize(bytes);
        }
        if (word == "buffer") {
            size_t size = 0, offset = 0;
            std::string name;
            fields >> size >> offset;
            std::getline(fields >> std::ws, name);
            buffers.push_back({size, name, allocate(size, offset)});
        }
        if (word == "pointer") {
            Pointer p{};
            fields >> p.holder >> p.at >> p.target >> p.delta;
            pointers.push_back(p);
        }
    }
    in.read(reinterpret_cast<char*>(params.data()), static_cast<std::streamsize>(params.size()));
    for (const Buffer& buffer : buffers) in.read(buffer.data, static_cast<std::streamsize>(buffer.size));
    for (const Pointer& p : pointers) {
        const uint64_t address =
            reinterpret_cast<uint64_t>(buffers[p.target].data) + static_cast<uint64_t>(p.delta);
        std::memcpy((p.holder < 0 ? reinterpret_cast<char*>(params.data()) : buffers[p.holder].data) + p.at,
                    &address, 8);
    }
    for (const Buffer& buffer : buffers)
        emu_add_buffer(reinterpret_cast<uint64_t>(buffer.data), buffer.size, buffer.name.c_str());

    static EmuFault fault;
    const int failed =
        emu_launch(kernel.c_str(), &launch, params.data(), static_cast<uint32_t>(params.size()), &fault);
    std::ofstream out(argv[2], std::ios::binary);
    out.write(reinterpret_cast<const char*>(&failed), sizeof failed);
    out.write(reinterpret_cast<const char*>(&fault), sizeof fault);
    for (const Buffer& buffer : buffers) out.write(buffer.data, static_cast<std::streamsize>(buffer.size));
    out.close();
    // Threads that a fault left behind are no leak: end without destructors.
    std::fflush(nullptr);
    return 0;
}
