# Headers of LibTorch's stable ABI, as the target `torch::stable`. No libtorch is linked.
#
# They come from -DTORCH_STABLE_INCLUDE_DIR, which the build backend sets when the target environment
# has no torch yet, else from that environment's torch. It is found by path, also from inside pip's
# build isolation: importing torch would cost seconds and fail without its CUDA libraries.
set(_stable_header torch/csrc/stable/library.h)
if(TORCH_STABLE_INCLUDE_DIR AND NOT EXISTS "${TORCH_STABLE_INCLUDE_DIR}/${_stable_header}")
  message(STATUS "No torch headers in ${TORCH_STABLE_INCLUDE_DIR} (any more): looking again")
  unset(TORCH_STABLE_INCLUDE_DIR CACHE)
  unset(TORCH_STABLE_INCLUDE_DIR)
endif()
if(NOT TORCH_STABLE_INCLUDE_DIR)
  execute_process(
    COMMAND
      "${Python_EXECUTABLE}" -c
      "import importlib.util, pathlib, sysconfig
spec = importlib.util.find_spec('torch')
home = spec.submodule_search_locations[0] if spec else sysconfig.get_path('purelib') + '/torch'
print(pathlib.Path(home, 'include').as_posix())"
    OUTPUT_VARIABLE _torch_include
    OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  if(_torch_include AND EXISTS "${_torch_include}/${_stable_header}")
    set(TORCH_STABLE_INCLUDE_DIR "${_torch_include}")
  endif()
endif()
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(
  TorchStable REQUIRED_VARS TORCH_STABLE_INCLUDE_DIR REASON_FAILURE_MESSAGE
  "torch 2.11 or newer must be installed, or its headers named by TORCH_STABLE_INCLUDE_DIR")

add_library(torch::stable INTERFACE IMPORTED)
target_include_directories(torch::stable SYSTEM INTERFACE "${TORCH_STABLE_INCLUDE_DIR}")
# The oldest release that the binary runs on; using anything newer is then a compile error.
target_compile_definitions(torch::stable INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)

# Python loads libtorch with RTLD_LOCAL, so its symbols reach a module only if the module names the
# library. An empty stand-in with the same file name gives that entry without torch at build time.
function(torch_stable_link target)
  foreach(_lib IN LISTS ARGN)
    if(NOT TARGET ${_lib}_stub)
      file(WRITE "${CMAKE_CURRENT_BINARY_DIR}/stub.c" "")
      add_library(${_lib}_stub SHARED "${CMAKE_CURRENT_BINARY_DIR}/stub.c")
      set_target_properties(
        ${_lib}_stub PROPERTIES OUTPUT_NAME ${_lib} LIBRARY_OUTPUT_DIRECTORY
                                                    "${CMAKE_CURRENT_BINARY_DIR}/stubs")
    endif()
    target_link_libraries(${target} PRIVATE -Wl,--push-state,--no-as-needed ${_lib}_stub
                                            -Wl,--pop-state)
  endforeach()
  set_target_properties(${target} PROPERTIES SKIP_BUILD_RPATH ON)
endfunction()
