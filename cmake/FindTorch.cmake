# LibTorch's CPU half, out of the PyPI wheel: attn::torch_cpu. Torch's own package file drags CUDA in; these two libraries
# need nothing of it but the CUDA runtime and CUPTI, which lie beside them and which their own RUNPATH finds.
set(ATTN_PYTHON_ENV "${PROJECT_SOURCE_DIR}/.venv" CACHE PATH "The virtual environment that holds the torch wheel")
file(GLOB _torch_roots "${ATTN_PYTHON_ENV}/lib/python3*/site-packages/torch")
find_path(Torch_INCLUDE_DIR ATen/ATen.h PATHS ${_torch_roots} PATH_SUFFIXES include NO_DEFAULT_PATH)
find_library(Torch_CPU_LIBRARY torch_cpu PATHS ${_torch_roots} PATH_SUFFIXES lib NO_DEFAULT_PATH)
find_library(Torch_C10_LIBRARY c10 PATHS ${_torch_roots} PATH_SUFFIXES lib NO_DEFAULT_PATH)
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  Torch REQUIRED_VARS Torch_CPU_LIBRARY Torch_C10_LIBRARY Torch_INCLUDE_DIR
  REASON_FAILURE_MESSAGE "run scripts/setup first: it installs the torch wheel into .venv")
if(Torch_FOUND AND NOT TARGET attn::torch_cpu)
  add_library(attn::torch_c10 SHARED IMPORTED GLOBAL)
  set_target_properties(attn::torch_c10 PROPERTIES IMPORTED_LOCATION ${Torch_C10_LIBRARY})
  add_library(attn::torch_cpu SHARED IMPORTED GLOBAL)
  set_target_properties(attn::torch_cpu PROPERTIES
    IMPORTED_LOCATION ${Torch_CPU_LIBRARY}
    INTERFACE_LINK_LIBRARIES attn::torch_c10
    INTERFACE_INCLUDE_DIRECTORIES "${Torch_INCLUDE_DIR};${Torch_INCLUDE_DIR}/torch/csrc/api/include")
endif()
