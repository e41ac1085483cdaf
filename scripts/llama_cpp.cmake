# What of llama.cpp the tests of exports need; scripts/install.sh has CMake read this.
# For any processor: a build for this one's AMX units crashes in matrices as small as the tests'.
set(GGML_NATIVE OFF)
# Neither the reader of pictures nor what only its own programs use, which are half of its code.
set(LLAVA_BUILD OFF)
set(LLAMA_BUILD_COMMON OFF)
# The models of the tests are tiny: they take no time, and a full optimisation does.
string(REPLACE "-O3" "-O1" CMAKE_C_FLAGS_RELEASE "${CMAKE_C_FLAGS_RELEASE}")
string(REPLACE "-O3" "-O1" CMAKE_CXX_FLAGS_RELEASE "${CMAKE_CXX_FLAGS_RELEASE}")
# Faster products of matrices, of which the tests' are small: two files that take long to compile.
set(GGML_LLAMAFILE OFF)
set(GGML_CPU_REPACK OFF)
