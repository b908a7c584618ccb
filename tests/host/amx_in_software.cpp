// The level amx is there in builds for sanitizers, on every processor that has the rest of what it needs
// (csrc/cpu/dispatch.cpp): its tiles are those of amx_in_software.h.
extern "C" bool tts_amx_in_software() { return true; }
