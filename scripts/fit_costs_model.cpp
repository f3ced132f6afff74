// Answers what the cost models of csrc/plan expect, for fit_costs.py: one line for each of its own.
//
//   device ARCH MULTIPROCESSORS SHARED_PER_BLOCK SHARED_PER_MULTIPROCESSOR
//                     from now on, with its architecture's constants; answers where these come from
//   problem TEXT      (see fit_costs.h) is remembered; answers the names of its candidates
//   constants         answers NAME VALUE LEAST MOST of each constant that is fitted
//   set NAME VALUE... answers "set"
//   clocks MODEL      answers the clocks of all candidates of all its problems, in their order
#include <iostream>
#include <utility>

#include "fit_costs.h"

using namespace torch_mbv2;

namespace {

class Model {
 public:
  std::string answer(const std::string& line) {
    std::istringstream words(line);
    std::string command;
    words >> command;
    if (command == "device") return set_device(words);
    if (command == "problem") return add_problem(line.substr(command.size() + 1));
    if (command == "constants") return constants();
    if (command == "set") return set(words);
    if (command == "clocks") return clocks(words);
    throw std::runtime_error("there is no command '" + line + "'");
  }

 private:
  std::string set_device(std::istringstream& words) {
    words >> device_.arch >> device_.multiprocessors >> device_.shared_per_block >>
        device_.shared_per_multiprocessor;
    if (words.fail() || device_.multiprocessors < 1) {
      throw std::runtime_error("device needs four numbers");
    }
    costs_ = plan::architecture_of(device_.arch);
    return plan::about_costs(device_.arch);
  }

  std::string add_problem(const std::string& text) {
    problems_.push_back(fit_costs::parse_problem(text));
    std::string names;
    for (const fit_costs::Candidate& c : fit_costs::candidates(problems_.back(), device_, costs_)) {
      names += (names.empty() ? "" : " ") + c.name;
    }
    return names;
  }

  std::string constants() {
    std::string text;
    for (const fit_costs::Constant& c : fit_costs::kConstants) {
      text += c.name + number(c.of(costs_)) + number(c.least) + number(c.most) + " ";
    }
    return text;
  }

  std::string set(std::istringstream& words) {
    std::string name;
    double value = 0;
    while (words >> name >> value) {
      bool known = false;
      for (const fit_costs::Constant& c : fit_costs::kConstants) {
        if (name != c.name) continue;
        c.of(costs_) = value;
        known = true;
      }
      if (!known) throw std::runtime_error("there is no constant " + name);
    }
    return "set";
  }

  std::string clocks(std::istringstream& words) const {
    std::string model, text;
    words >> model;
    for (const fit_costs::Problem& problem : problems_) {
      if (fit_costs::model_of(problem) != model) continue;
      for (const fit_costs::Candidate& c : fit_costs::candidates(problem, device_, costs_)) {
        text += number(c.clocks);
      }
    }
    return text;
  }

  static std::string number(double value) {
    return fit_costs::detail::words(" %.17g", value);  // all digits, so that ties stay ties
  }

  Device device_{};
  plan::Architecture costs_ = plan::architecture_of(0);
  std::vector<fit_costs::Problem> problems_;
};

}  // namespace

int main() {
  Model model;
  for (std::string line; std::getline(std::cin, line);) {
    try {
      std::cout << model.answer(line) << std::endl;
    } catch (const std::exception& error) {
      std::cerr << "fit_costs_model: " << error.what() << std::endl;
      return 2;
    }
  }
  return 0;
}
