// Arguments NAME=VALUE of a program, each of which sets one thing.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <string>

using Settings = std::map<std::string, std::function<void(double)>>;

// Ends the program with exit status 2 if there is no such setting.
inline void apply(const Settings& settings, int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    char* const value = std::strchr(argv[i], '=');
    const auto found =
        value == nullptr ? settings.end() : settings.find(std::string(argv[i], value));
    if (found == settings.end()) {
      std::fprintf(stderr, "no such setting: %s\n", argv[i]);
      std::exit(2);
    }
    found->second(std::atof(value + 1));
  }
}
