#!/usr/bin/env python3
"""libunmoor as others get it: installed to a prefix of its own, found with pkg-config, used as nobody.

library_install.py --build DIR --unmoor PROGRAM

  - only the API's symbols are exported, and every function of the C header is among them
  - each public header compiles alone, as C++20 (C11), without the source tree and third-party code
  - both examples of docs/ build with nothing but pkg-config, static and shared, and run without
    privileges: make an image, map it, write while it is remapped, checkpoint again, delete the first
  - the example in Python does the same by way of ctypes (the C API from a foreign language)
  - a CMake project finds the package
  - `unmoor show` tells what such an image is, `unmoor restore` refuses it by name
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile

SOURCE = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--no-new-privs"]
FLAGS = ["-O2", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
COMPILERS = {".c": ["gcc", "-std=c11"], ".cpp": ["g++", "-std=c++20"]}


def run(command, **options):
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          timeout=300, **options)
    if done.returncode != 0:
        sys.exit(f"failed ({done.returncode}): {' '.join(command)}\n{done.stdout}")
    return done.stdout


def install(build, prefix):
    run(["cmake", "--install", build, "--prefix", prefix, "--component", "library"])
    found = [folder for folder, _, files in os.walk(prefix) if "unmoor.pc" in files]
    assert len(found) == 1, f"unmoor.pc is in {found}"
    return os.path.dirname(found[0])  # libdir


def check_symbols(libdir):
    lines = run(["nm", "-D", "--defined-only", os.path.join(libdir, "libunmoor.so")]).splitlines()
    names = {line.split()[-1].split("@")[0] for line in lines if line.split()[-2] != "A"}
    with open(os.path.join(SOURCE, "include/unmoor/c/unmoor.h"), encoding="utf-8") as file:
        functions = set(re.findall(r"^[a-z].*?\b(unmoor_\w+)\(", file.read(), re.MULTILINE))
    missing = functions - names
    assert not missing, f"not exported: {sorted(missing)}"
    public = re.compile(r"_ZNK?6unmoor2v1(9PageImage|15PageImageWriter|9DirectMap|12DirtyTracker"
                        r"|18BackgroundRemapper|10Checkpoint|11QueryStatus)")
    foreign = {name for name in names - functions if not public.match(name) or "4Impl" in name}
    assert not foreign, f"exported, but not of the API: {sorted(foreign)}"
    dynamic = run(["readelf", "-d", os.path.join(libdir, "libunmoor.so")])
    assert re.search(r"SONAME.*libunmoor\.so\.\d+\]", dynamic), dynamic
    needed = set(re.findall(r"NEEDED.*\[(.*?)\]", dynamic))
    other = {name for name in needed if not re.match(r"lib(stdc\+\+|gcc_s|c|m)\.so", name)
             and not name.startswith("ld-linux")}
    assert not other, f"libunmoor.so needs {sorted(other)}"
    print(f"{len(names)} symbols exported, {len(functions)} of them C functions")


def check_headers(prefix):
    count = 0
    for folder, _, files in os.walk(os.path.join(prefix, "include")):
        for name in files:
            path = os.path.join(folder, name)
            with open(path, encoding="utf-8") as file:
                text = file.read()
            for target in re.findall(r'^#\s*include\s*["<](.*?)[">]', text, re.MULTILINE):
                assert target.startswith("unmoor/") or re.fullmatch(r"[a-z_0-9]+(\.h)?", target), \
                    f"{name} includes {target}"
            kinds = ["c", "c++"] if "/c/" in path else ["c++"]
            for kind in kinds:
                compiler = COMPILERS[".c" if kind == "c" else ".cpp"]
                run(compiler + FLAGS + ["-I", os.path.join(prefix, "include"), "-x", kind,
                                        "-include", path, "-fsyntax-only", "/dev/null"])
            count += 1
    print(f"{count} headers compile alone")


def pkg_config(libdir, *arguments):
    environment = dict(os.environ, PKG_CONFIG_PATH=os.path.join(libdir, "pkgconfig"))
    return run(["pkg-config", *arguments, "unmoor"], env=environment).split()


def check_commands(unmoor, image):
    shown = run([unmoor, "show", "-D", image])
    assert "image of memory" in shown and "1 deltas" in shown and "made after" in shown, shown
    refused = subprocess.run([unmoor, "restore", "-D", image], text=True, capture_output=True,
                             timeout=60, check=False)
    lines = refused.stderr.splitlines()
    assert refused.returncode == 2 and len(lines) == 1 and "image of memory" in lines[0], refused
    print(f"restore says: {lines[0]}")


def run_examples(libdir, where, static, unmoor):
    for suffix, compiler in COMPILERS.items():
        source = os.path.join(SOURCE, "docs/examples/remap" + suffix)
        program = os.path.join(where, "example" + suffix.replace(".", "-"))
        flags = pkg_config(libdir, "--cflags", "--libs", *(["--static"] if static else []))
        run(compiler + FLAGS + [source, "-o", program] + flags)
        linked = "libunmoor" in run(["readelf", "-d", program])
        assert linked != static, f"{program} is linked the wrong way"
        data = os.path.join(where, "data")
        os.mkdir(data)
        os.chown(data, 65534, 65534)
        arguments = [data]
        if suffix == ".c":
            first = os.path.join(data, "first")
            arguments = [first, os.path.join(data, "second"), f"rm -r {first}"]
        environment = dict(os.environ, LD_LIBRARY_PATH="" if static else libdir)
        output = run(NOBODY + [program] + arguments, env=environment)
        assert "equal" in output, output
        assert os.listdir(data) == ["second"], os.listdir(data)
        check_commands(unmoor, os.path.join(data, "second"))
        shutil.rmtree(data)
        print(f"{'static' if static else 'shared'} {suffix[1:]}: {output.strip()}")


def run_by_ctypes(libdir, where):
    data = os.path.join(where, "data")
    os.mkdir(data)
    os.chown(data, 65534, 65534)
    output = run(NOBODY + [sys.executable, "-B", os.path.join(SOURCE, "docs/examples/remap.py"), data],
                 env=dict(os.environ, LD_LIBRARY_PATH=libdir))
    assert output.strip() == "equal" and os.listdir(data) == ["second"], (output, os.listdir(data))
    shutil.rmtree(data)
    print("by ctypes: equal")


def check_cmake_package(prefix, where):
    project = os.path.join(where, "project")
    os.mkdir(project)
    with open(os.path.join(project, "CMakeLists.txt"), "w", encoding="utf-8") as file:
        file.write(f"""cmake_minimum_required(VERSION 3.20)
project(uses_unmoor C CXX)
set(CMAKE_CXX_STANDARD 20)
find_package(unmoor 0.1 REQUIRED)
add_executable(shared {SOURCE}/docs/examples/remap.cpp)
target_link_libraries(shared unmoor::unmoor)
add_executable(static {SOURCE}/docs/examples/remap.c)
target_link_libraries(static unmoor::static)
""")
    run(["cmake", "-S", project, "-B", project + "/build", f"-DCMAKE_PREFIX_PATH={prefix}"])
    run(["cmake", "--build", project + "/build"])
    print("a CMake project finds and links both libraries")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--build", required=True)
    parser.add_argument("--unmoor", required=True)
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        print("not root, cannot become nobody: skipped")
        sys.exit(77)
    with tempfile.TemporaryDirectory(prefix="unmoor-install-") as where:
        os.chmod(where, 0o755)
        prefix = os.path.join(where, "prefix")
        libdir = install(arguments.build, prefix)
        check_symbols(libdir)
        check_headers(prefix)
        check_cmake_package(prefix, where)
        run_examples(libdir, where, False, arguments.unmoor)
        run_by_ctypes(libdir, where)
        for name in os.listdir(libdir):
            if ".so" in name:
                os.remove(os.path.join(libdir, name))
        run_examples(libdir, where, True, arguments.unmoor)


if __name__ == "__main__":
    main()
