# torch's stable ABI: headers and the libraries that hold its C shim, as the target Torch::Stable.
#
# Asks the Python interpreter for torch, or takes TORCH_DIR (the folder of the torch package). Unlike
# find_package(Torch) it does not demand a CUDA toolkit where torch was built with CUDA.
if(NOT TORCH_DIR)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
    OUTPUT_VARIABLE TORCH_DIR OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
find_path(TorchStable_INCLUDE_DIR torch/csrc/stable/library.h PATHS ${TORCH_DIR}/include NO_DEFAULT_PATH)
find_library(TorchStable_CPU_LIBRARY torch_cpu PATHS ${TORCH_DIR}/lib NO_DEFAULT_PATH)
find_library(TorchStable_LIBRARY torch PATHS ${TORCH_DIR}/lib NO_DEFAULT_PATH)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(TorchStable REQUIRED_VARS TorchStable_CPU_LIBRARY TorchStable_INCLUDE_DIR
  REASON_FAILURE_MESSAGE "install torch for ${Python_EXECUTABLE}, or pass -DTORCH_DIR=<folder of the torch package>")
if(TorchStable_FOUND AND NOT TARGET Torch::Stable)
  add_library(Torch::Stable INTERFACE IMPORTED)
  target_include_directories(Torch::Stable SYSTEM INTERFACE ${TorchStable_INCLUDE_DIR})
  target_link_libraries(Torch::Stable INTERFACE ${TorchStable_CPU_LIBRARY})
  # 2.10 is the oldest release whose stable ABI has parallel_for.
  target_compile_definitions(Torch::Stable INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
endif()
