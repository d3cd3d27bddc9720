# GTest::gtest_main: the system's GoogleTest, else its release fetched by CMake.
find_package(GTest QUIET)
if(NOT TARGET GTest::gtest_main)
  message(STATUS "No GoogleTest is installed: fetching it")
  include(FetchContent)
  FetchContent_Declare(
    googletest
    URL https://github.com/google/googletest/archive/refs/tags/v1.15.2.tar.gz
    URL_HASH SHA256=7b42b4d6ed48810c5362c265a17faebe90dc2373c885e5216439d37927f02926
    DOWNLOAD_EXTRACT_TIMESTAMP ON)
  # CMake stops here on its own when the download fails; say first what to do about it.
  message(STATUS "Without a network, install the package libgtest-dev (Debian, Ubuntu) or "
                 "gtest-devel (Fedora), or pass -DGTest_ROOT=<prefix>")
  FetchContent_MakeAvailable(googletest)
endif()
