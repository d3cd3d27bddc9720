# Is there a CUDA compiler, and for which GPUs does it build?
#
# VRAMKIT_CUDA (variable or environment): auto takes the nvcc on PATH or in CUDACXX if there is one;
# on fails without one; off builds nothing for CUDA; wheels takes NVIDIA's compiler wheels from the
# Python environment that builds (build_backend/ installs them into pip's isolated one).
# VRAMKIT_CUDA_ARCHITECTURES (variable or environment): compute capabilities such as "80;90", else
# those of the GPUs in this machine, else 80 90 120. The newest is also kept as PTX, for later GPUs.
#
# Sets VRAMKIT_CUDA_FOUND; then the language is enabled and CUDA::cudart_static is there.
function(_vramkit_choice name default doc)
  if(NOT DEFINED ${name})
    if(DEFINED ENV{${name}} AND NOT "$ENV{${name}}" STREQUAL "")
      set(default "$ENV{${name}}")
    endif()
  endif()
  set(${name} "${default}" CACHE STRING "${doc}")
endfunction()
_vramkit_choice(VRAMKIT_CUDA auto "CUDA kernels and backend: auto, on, off or wheels")
_vramkit_choice(VRAMKIT_CUDA_ARCHITECTURES "" "Compute capabilities, such as 80;90;120")

set(VRAMKIT_CUDA_FOUND FALSE)
string(TOLOWER "${VRAMKIT_CUDA}" _cuda)
if(NOT _cuda MATCHES "^(auto|on|off|wheels)$")
  message(FATAL_ERROR "VRAMKIT_CUDA is auto, on, off or wheels, not '${VRAMKIT_CUDA}'")
endif()
if(_cuda STREQUAL "off")
  return()
endif()

# The build backend names the compiler by CUDACXX.
if(_cuda STREQUAL "wheels" AND NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_package(Python REQUIRED COMPONENTS Interpreter)
  execute_process(
    COMMAND
      "${Python_EXECUTABLE}" -c
      "import importlib.util, pathlib
spec = importlib.util.find_spec('nvidia')
roots = spec.submodule_search_locations if spec else []
found = [n for r in roots for n in sorted(pathlib.Path(r).glob('cu*/bin/nvcc'))]
print(found[-1].as_posix() if found else '', end='')"
    OUTPUT_VARIABLE _nvcc)
  if(_nvcc)
    set(CMAKE_CUDA_COMPILER "${_nvcc}" CACHE FILEPATH "nvcc of NVIDIA's wheels")
    cmake_path(GET _nvcc PARENT_PATH _bin)
    cmake_path(GET _bin PARENT_PATH _root)
    set(CUDAToolkit_ROOT "${_root}" CACHE PATH "Toolkit of NVIDIA's wheels")
  else()
    message(FATAL_ERROR "VRAMKIT_CUDA=wheels, but ${Python_EXECUTABLE} has no nvidia/cu*/bin/nvcc: "
                        "pip install 'nvidia-cuda-nvcc==13.0.*' 'nvidia-nvvm==13.0.*' "
                        "'nvidia-cuda-crt==13.0.*' 'nvidia-cuda-runtime==13.0.*' "
                        "'nvidia-cuda-cccl==13.0.*'")
  endif()
endif()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(NOT _cuda STREQUAL "auto")
    message(FATAL_ERROR "VRAMKIT_CUDA=${VRAMKIT_CUDA}, but no CUDA compiler was found")
  endif()
  message(STATUS "No CUDA compiler: built for the CPU alone")
  return()
endif()

set(_architectures "${VRAMKIT_CUDA_ARCHITECTURES}")
if(NOT _architectures)
  find_program(VRAMKIT_NVIDIA_SMI nvidia-smi)
  if(VRAMKIT_NVIDIA_SMI)
    execute_process(
      COMMAND "${VRAMKIT_NVIDIA_SMI}" --query-gpu=compute_cap --format=csv,noheader
      OUTPUT_VARIABLE _architectures ERROR_QUIET RESULT_VARIABLE _failed)
    if(_failed OR NOT _architectures MATCHES "^[0-9]+\\.[0-9]+")
      set(_architectures "")
    endif()
  endif()
endif()
if(NOT _architectures)
  set(_architectures 80 90 120)
endif()
string(REGEX REPLACE "[ ,\n]+" ";" _architectures "${_architectures}")
list(TRANSFORM _architectures REPLACE "\\." "")
list(REMOVE_ITEM _architectures "")
list(REMOVE_DUPLICATES _architectures)
list(SORT _architectures COMPARE NATURAL)
list(GET _architectures -1 _newest)
list(TRANSFORM _architectures APPEND "-real")
set(CMAKE_CUDA_ARCHITECTURES ${_architectures} ${_newest}-virtual)

enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
if(CUDAToolkit_VERSION VERSION_LESS 12.8)
  message(FATAL_ERROR "CUDA ${CUDAToolkit_VERSION} is too old: 12.8 or newer, or VRAMKIT_CUDA=off")
endif()
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
if(NOT DEFINED CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
  # Older releases of CMake do not know that this nvcc has C++20.
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
endif()
# As on the CPU: no fused multiply-adds but by intrinsic, and nothing else that rounds differently
# (nvcc divides and takes roots correctly rounded, and keeps subnormals, unless asked not to).
set(VRAMKIT_CUDA_OPTIONS -fmad=false --expt-relaxed-constexpr --compress-mode=size
                         -Xcompiler=-Wall,-Wextra,-ffp-contract=off)
# For tools/cuda_report.py --log: what each kernel takes, in the build's output.
if(NOT "$ENV{VRAMKIT_CUDA_REPORT}" STREQUAL "")
  list(APPEND VRAMKIT_CUDA_OPTIONS -Xptxas=-v)
endif()
set(VRAMKIT_CUDA_FOUND TRUE)
message(STATUS "CUDA ${CUDAToolkit_VERSION} for ${CMAKE_CUDA_ARCHITECTURES}")
