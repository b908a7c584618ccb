// An owned array of int32, not initialised. The host module gives it to Python without a copy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

namespace tts {

class IntBuffer {
  public:
    IntBuffer() = default;
    explicit IntBuffer(size_t size) : size_(size), data_(std::make_unique_for_overwrite<int32_t[]>(size)) {}

    size_t size() const { return size_; }
    int32_t* data() { return data_.get(); }
    const int32_t* data() const { return data_.get(); }
    std::span<int32_t> span() { return {data_.get(), size_}; }
    int32_t& operator[](size_t i) { return data_[i]; }
    int32_t operator[](size_t i) const { return data_[i]; }

  private:
    size_t size_ = 0;
    std::unique_ptr<int32_t[]> data_;
};

}  // namespace tts
