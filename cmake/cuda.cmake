# The CUDA library, where it can be built. Says in one line what was decided; with APPO_CUDA=ON, why it cannot be done is an
# error that says what would help.

# pip shows the line with -v only; `python -m appo_kernels.doctor` reads it from the package.
function(say_and_install decision)
  message(STATUS "appo: ${decision}")
  file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/cuda_build.txt "${decision}\n")
  install(FILES ${CMAKE_CURRENT_BINARY_DIR}/cuda_build.txt DESTINATION appo_kernels)
endfunction()

# Sets `problem` in the caller to why the CUDA kernels cannot be built here, or to "".
function(find_problem_with_cuda)
  include(CheckLanguage)
  if(NOT CMAKE_CUDA_COMPILER)
    unset(CMAKE_CUDA_COMPILER CACHE)  # "not found" in a build directory of last time: nvcc may have been installed since
  endif()
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    find_program(nvcc nvcc HINTS ENV CUDACXX ENV CUDA_HOME ENV CUDA_PATH PATH_SUFFIXES bin NO_CACHE)
    if(nvcc)
      set(problem "${nvcc} cannot compile here (it needs a C++ compiler that it supports: set CUDAHOSTCXX to one)")
    else()
      set(problem "no nvcc found (install the CUDA toolkit, 12.8 or later for sm_100a; put nvcc on PATH or set CUDACXX)")
    endif()
  endif()
  set(problem "${problem}" PARENT_SCOPE)
endfunction()

# nvcc's arguments for APPO_CUDA_ARCHS, and which architectures they are, in the caller's `arch_options` and `arch_names`.
# What this nvcc does not know is left out, unless the user chose the list.
function(choose_architectures)
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-code OUTPUT_VARIABLE known)
  string(REPLACE "sm_" "" known "${known}")
  string(REGEX MATCHALL "[0-9]+" known "${known}")
  set(codes)
  foreach(arch IN LISTS APPO_CUDA_ARCHS)
    if(arch STREQUAL "PTX")
      list(APPEND codes compute_80)
      continue()
    endif()
    string(REGEX REPLACE "a$" "" base "${arch}")
    if(base IN_LIST known)
      list(APPEND codes sm_${arch})
    elseif(DEFINED ENV{APPO_CUDA_ARCHS} OR NOT "${APPO_CUDA_ARCHS}" STREQUAL "80;86;89;90a;100a;PTX")
      message(FATAL_ERROR "APPO_CUDA_ARCHS: expected architectures that ${CMAKE_CUDA_COMPILER} ${CMAKE_CUDA_COMPILER_VERSION} "
                          "knows (${known}; also 90a, 100a, PTX), got \"${arch}\". Remove it or use a newer CUDA toolkit.")
    else()
      message(STATUS "appo: this nvcc does not know sm_${arch}; PTX serves such GPUs")
    endif()
  endforeach()
  # One front end for all: the kernels use instructions of sm_80 only, so just the last stage differs.
  string(REPLACE ";" "," joined "${codes}")
  set(arch_options "SHELL:-gencode arch=compute_80,code=[${joined}]" PARENT_SCOPE)
  string(REPLACE "," " " names "${joined}")
  set(arch_names "${names}" PARENT_SCOPE)
endfunction()

if(APPO_CUDA STREQUAL "OFF")
  say_and_install("CUDA kernels not built (APPO_CUDA=OFF)")
  return()
endif()
set(CMAKE_CUDA_ARCHITECTURES OFF)  # chosen below, as arguments
find_problem_with_cuda()
if(problem AND APPO_CUDA STREQUAL "ON")
  message(FATAL_ERROR "appo: APPO_CUDA=ON, but ${problem}. With APPO_CUDA=AUTO the CUDA kernels would be left out.")
elseif(problem)
  say_and_install("CUDA kernels not built: ${problem}; Triton serves NVIDIA GPUs without them")
  return()
endif()

enable_language(CUDA)
choose_architectures()
say_and_install("CUDA kernels built with nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${arch_names}")

# A directory of its own, so that the next install compiles only what changed: each `pip install` has another build environment,
# for which scikit-build-core removes CMakeFiles/ of the top directory, and what has been compiled with it.
add_subdirectory(csrc)
